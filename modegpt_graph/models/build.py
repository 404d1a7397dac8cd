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


def class_of(config: Any) -> Any:
    """The library's class of causal language models of `config`, None where it has none.

    That of its automatic classes; else the one that the configuration names: a part of a larger model has no other.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    known = (getattr(transformers, name, None) for name in config.architectures or () if name in dir(transformers))
    return next((made for made in known if _makes(made, config)), None)


def _makes(made: Any, config: Any) -> bool:
    """Whether `made` is a class that writes text and is built from such a configuration."""
    return getattr(made, "config_class", None) is type(config) and made.can_generate()


def model_of(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """A causal language model built from a copy of `config`, in evaluation mode, on the device of the context.

    Raises what the transformers library raises where the configuration is not of a causal language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = copy.deepcopy(config)
    with quiet():
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and (own := class_of(config)) is not None:
            model = own._from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
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
