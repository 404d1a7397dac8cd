"""Modules from configurations: on the meta device, with random weights, or read from a folder."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from modegpt_graph.models.depth import shallow

SMALL_VECTOR_NOISE = 0.1


@contextmanager
def quiet() -> Iterator[None]:
    """Without the transformers library's progress bars and below-error log lines; the screen belongs to the caller."""
    from transformers.utils import logging as library_logging

    level, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity(logging.ERROR)
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if bars:
            library_logging.enable_progress_bar()


def model_of(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """A causal language model built from a copy of `config`, in evaluation mode, on the device of the context.

    Raises what the transformers library raises where the configuration is not of a causal language model.
    """
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
        )
    return frozen(model)


def frozen(model: nn.Module) -> nn.Module:
    """The same module in evaluation mode, its parameters without gradients."""
    return model.eval().requires_grad_(False)


def random_model(config: Any, *, seed: int, max_layers: int, trust_remote_code: bool = False) -> nn.Module:
    """A float32 model with seeded random weights and at most `max_layers` layers; the global generator is left alone.

    Vectors (biases, norm weights) get noise on top of the library's zeros and ones: with those, a lost bias or a norm
    weight in the wrong order would go unseen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_of(shallow(config, max_layers), torch.float32, trust_remote_code=trust_remote_code)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(SMALL_VECTOR_NOISE * torch.randn_like(parameter))
    return model
