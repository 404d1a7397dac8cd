"""Models in GGUF files: read through the transformers library, dequantised, and written as an ordinary folder."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from modegpt_graph.models.build import model_of, quiet


def gguf_config(file: Path) -> Any:
    """The configuration written in the header of `file`. Raises what the transformers library raises."""
    from transformers import AutoConfig

    with _reading():
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer written in the header of `file`. Raises what the transformers library raises."""
    from transformers import AutoTokenizer

    with quiet(), _reading():
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def load_gguf(file: Path, dtype: torch.dtype) -> nn.Module:
    """The model in `file`, dequantised to `dtype`: a plain module that no longer knows of its quantisation."""
    from transformers import AutoModelForCausalLM

    with quiet(), _reading():
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    # The library leaves a quantiser and a save path of its own on what it dequantised; a fresh module has none of that.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    model: Any = model_of(config, dtype)
    model.load_state_dict(read.state_dict())
    if getattr(read, "generation_config", None) is not None:
        model.generation_config = read.generation_config
    return model


def convert(file: Path, directory: Path) -> None:
    """Write the model and tokenizer of `file` into `directory` as float32 safetensors."""
    model: Any = load_gguf(file, torch.float32)
    with quiet():
        model.save_pretrained(directory)
    gguf_tokenizer(file).save_pretrained(directory)


@contextmanager
def _reading() -> Iterator[None]:
    """Within this context the library reads the header of a file once, and a large vocabulary three times as fast.

    The library asks for the header several times over, and slices a memory map a million times for a vocabulary of
    262,144 tokens; slices of a plain array on the same memory cost a third.
    """
    import gguf

    original: Any = gguf.GGUFReader

    class Reader(original):
        @property
        def data(self) -> numpy.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: numpy.ndarray) -> None:
            self._plain = numpy.asarray(mapped)

    gguf.GGUFReader = cache(Reader)
    try:
        yield
    finally:
        gguf.GGUFReader = original
