"""Calling a decoder, whatever it is: token ids in, logits out, and a key/value cache between calls."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.errors import InputError

# The library's names for the argument that a cache is given back under: the second is that of its releases before 5.24.
_CACHE_KEYWORDS = ("cache", "past_key_values")


def forward_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, S) token ids to (B, S, V) logits in one pass, without a key/value cache.

    A module from the transformers library is told to keep no cache; any other is called with the token ids alone.
    Raises InputError where what it returns is no logits.
    """
    tokens = tokens.to(device_of(model))
    return logits_of(model(tokens, use_cache=False) if can_generate(model) else model(tokens))


def logits_of(output: Any) -> Tensor:
    """The (B, S, V) logits of a forward pass: the output itself, its `.logits`, or the first of a tuple."""
    if isinstance(output, tuple):
        output = output[0]
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise InputError(f"the model must return (B, S, V) logits or have them as .logits, not {type(output).__name__}")
    return logits


def overflow_advice(dtype: torch.dtype) -> str:
    """What to do where values of `dtype` are not finite."""
    if dtype.itemsize < 4:
        return "try --dtype float32"
    return "float32 does not hold them either: the weights are damaged, or not those of this configuration"


def can_generate(model: nn.Module) -> bool:
    """Whether the model has the transformers library's `generate`, and with it a key/value cache."""
    return callable(getattr(model, "generate", None)) and getattr(model, "config", None) is not None


def is_cache(value: object) -> bool:
    """Whether a value is a key/value cache, told by what it can do."""
    return callable(getattr(value, "update", None)) and callable(getattr(value, "get_seq_length", None))


def cache_of(output: Any) -> Any:
    """The key/value cache that a forward pass returned, None where it returned none."""
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ()
    return next((value for value in values if is_cache(value)), None)


def cache_keyword(model: nn.Module) -> str | None:
    """Name of the argument under which a model takes back the cache it returned; None where it keeps none."""
    accepted = inspect.signature(model.forward).parameters
    if not accepts_use_cache(model):
        return None
    return next((name for name in _CACHE_KEYWORDS if name in accepted), None)


def accepts_use_cache(model: nn.Module) -> bool:
    """Whether a model can be told to keep a cache or none: by an argument of its own, or by one that it hands on."""
    accepted = inspect.signature(model.forward).parameters
    handed_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values())
    return "use_cache" in accepted or (handed_on and can_generate(model))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def vocabulary_of(model: nn.Module) -> int:
    """How many token ids a model reads: the rows of its input embedding, which the library's models name.

    As many as it writes where it has no such module.
    """
    table = model.get_input_embeddings() if can_generate(model) else None  # type: ignore[operator]
    if not isinstance(table, nn.Embedding):
        table = next((part for part in model.modules() if isinstance(part, nn.Embedding)), None)
    if table is None:
        with torch.no_grad():
            return forward_logits(model, torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    return table.num_embeddings


def positions_of(model: nn.Module | None) -> int | None:
    """How many positions a transformers model was made for; None where its configuration names no such limit."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
