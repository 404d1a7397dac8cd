"""A model that has been found: its configuration, and the ways to make a module of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from modegpt_graph.errors import InputError
from modegpt_graph.models.build import class_of, frozen, model_of, quiet, random_model
from modegpt_graph.models.gguf import gguf_tokenizer, load_gguf
from modegpt_graph.models.skeleton import skeleton_of

Kind = Literal["hub", "folder", "gguf", "architecture", "factory", "demo", "module"]
Made = TypeVar("Made")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. Nothing of its weights is in memory until `load`, except for a module given in memory.

    name: what the user called it.   architecture: class name of the module.
    config: the transformers configuration; None for modules from elsewhere.
    example_inputs: positional inputs, needed where there is no configuration; None otherwise.
    location: hub id, folder or file that the weights and tokenizer are read from; None where there is none.
    local_files_only: the hub was out of reach, and only the local cache is asked.
    """

    name: str
    architecture: str
    kind: Kind
    config: Any
    example_inputs: tuple[Any, ...] | None
    has_weights: bool
    location: str | Path | None = None
    module: nn.Module | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    local_files_only: bool = False

    def skeleton(self) -> nn.Module:
        """The module on the meta device, in evaluation mode: shapes and no data, whatever the size.

        Raises InputError where the configuration describes a model that cannot be built.
        """
        if self.module is not None:
            return skeleton_of(self.module)
        with torch.device("meta"):
            return self._made(lambda: model_of(self.config, torch.float32, trust_remote_code=self.trust_remote_code))

    def load(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module with its weights in `dtype`, in evaluation mode and without gradients.

        A module given in memory is returned as it is, the same object. Raises InputError where there are no weights.
        """
        if self.module is not None:
            return self._in_memory(self.module)
        if not self.has_weights:
            raise InputError(
                f"{self.name} is a configuration without weights (*.safetensors); only `analyze` and `verify` need none"
            )
        if self.kind == "gguf":
            return self._made(lambda: load_gguf(Path(str(self.location)), dtype))
        return self._made(lambda: self._load_pretrained(dtype))

    def random(self, seed: int, max_layers: int = 2) -> nn.Module:
        """A float32 module of this configuration with seeded random weights, at most `max_layers` layers deep.

        The other sizes are those of the configuration. Raises InputError for a module that has no configuration.
        """
        if self.config is None:
            raise InputError(
                f"{self.name} has no configuration to draw random weights for; its own weights are there to use"
            )
        return self._made(
            lambda: random_model(
                self.config, seed=seed, max_layers=max_layers, trust_remote_code=self.trust_remote_code
            )
        )

    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the model, or None where there is none.

        For a transformers module in memory: the one of the folder (or cached hub model) that it was loaded from.
        """
        if self.location is None:
            return None
        if self.kind == "gguf":
            return self._made(lambda: gguf_tokenizer(Path(self.location or "")))
        if Path(self.location).is_dir() and not any((Path(self.location) / name).is_file() for name in TOKENIZER_FILES):
            return None
        try:
            return self._made(self._load_tokenizer)
        except InputError:
            if self.kind == "module":
                return None
            raise

    def _in_memory(self, module: nn.Module) -> nn.Module:
        if not self.has_weights:
            raise InputError(
                f"{self.name} lies on the meta device: it has shapes and no weights; load it on a real device"
            )
        return module if self.kind == "module" else frozen(module)

    def _load_pretrained(self, dtype: torch.dtype) -> nn.Module:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

        own = None if type(self.config) in MODEL_FOR_CAUSAL_LM_MAPPING else class_of(self.config)
        with quiet():
            model = (own or AutoModelForCausalLM).from_pretrained(
                str(self.location),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
                local_files_only=self.local_files_only,
            )
        return frozen(model)

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with quiet():
            return AutoTokenizer.from_pretrained(
                self.location, trust_remote_code=self.trust_remote_code, local_files_only=self.local_files_only
            )

    def _made(self, make: Callable[[], Made]) -> Made:
        """The result of `make`; whatever the library says of this model becomes one line with the model's name."""
        try:
            return make()
        except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{self.name}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
