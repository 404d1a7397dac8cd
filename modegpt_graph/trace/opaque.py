"""Two operations stay opaque in every trace, the attention interface and the cache update: they stay the library's.

While `opaque_calls` is active, the library's attention dispatch hands its arguments to one custom operator, whose node
keeps what the call said (the module, the scale, the constants, the tensors beside mask and operands). `TracedCache`
does the same for `update`. A rewritten module calls the real interface and the real cache again in their places.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from modegpt_graph.errors import ModegptError
from modegpt_graph.models import is_cache


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention interface: what its node must say again when the code is emitted.

    path: of the module that called, within the traced one.
    tensors: names of the keyword arguments that were tensors, in the order of the node's `extras`.
    constants: keyword arguments that the module itself gave.   passed_through: those it took from its own caller.
    """

    path: str | None
    fallback: Callable[..., Any]
    scaling: float | None
    tensors: tuple[str, ...]
    constants: Mapping[str, Any]
    passed_through: tuple[str, ...]


@dataclass(frozen=True)
class CacheCall:
    """One `cache.update(key, value, layer)`.

    part: the attribute of the model's cache that was updated, None for that cache itself.
    """

    layer: int
    part: str | None = None


class AttentionWeights:
    """Stands for the attention weights that an opaque call does not compute."""


class Recorder:
    """The opaque calls of one trace, in order (a node's `call` argument indexes them), and what the module returned."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[AttentionCall | CacheCall] = []
        self.output: Any = None
        self.left: tuple[str, ...] = ()  # names of tensors that the module made and left in its attributes
        self.unset: tuple[str, ...] = ()  # see `Trace`
        self.assumes_all = False  # a loop over what a mask meets was traced as if it met everything
        self._paths = {id(part): path for path, part in module.named_modules()}

    def path_of(self, module: nn.Module) -> str | None:
        """Where a module lies within the traced one; None outside of it."""
        return self._paths.get(id(module))

    def assume_all(self) -> None:
        """Say that a loop over what a mask meets is traced as if it met everything."""
        self.assumes_all = True

    def add(self, call: AttentionCall | CacheCall) -> int:
        self.calls.append(call)
        return len(self.calls) - 1


@torch.library.custom_op("modegpt_graph::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extras: Sequence[Tensor], scale: float, call: int
) -> Tensor:
    """Softmax attention, for probes. query (B, H, S, d), key (B, G, T, d), value (B, G, T, e) → (B, S, H, e)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scale  # (B, H, S, T)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous()


@attention.register_fake
def _(query, key, value, mask, extras, scale, call):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("modegpt_graph::cache_update", mutates_args=())
def cache_update(key: Tensor, value: Tensor, length: int, call: int) -> tuple[Tensor, Tensor]:
    """The keys and values of all positions so far; `length` counts them. Only ever traced."""
    raise NotImplementedError("a traced cache update cannot be run")


@cache_update.register_fake
def _(key, value, length, call):
    return (
        key.new_empty(*key.shape[:-2], length, key.shape[-1]),
        value.new_empty(*value.shape[:-2], length, value.shape[-1]),
    )


class TracedCache:
    """A cache whose `update` is one opaque node; everything else is the cache it stands for, to `isinstance` too.

    length: tokens in it after an update; None where no argument of the traced module tells.
    part: the attribute of the model's cache that it is (`self_attention_cache`, say), None for that cache itself.
    """

    def __init__(self, cache: Any, recorder: Recorder, length: int | None, part: str | None = None) -> None:
        self._cache, self._recorder, self._length, self._part = cache, recorder, length, part

    @property
    def __class__(self) -> type:
        return type(self._cache)

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._length is None:
            raise ModegptError("the module updates a cache, but no argument tells how many tokens are in it")
        call = self._recorder.add(CacheCall(layer, self._part))
        return torch.ops.modegpt_graph.cache_update(key, value, self._length, call)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cache, name)
        if is_cache(value) and self._part is None:
            return TracedCache(value, self._recorder, self._length, name)
        return self._only_asked(name, value) if callable(value) else value

    def _only_asked(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method that may be asked for what the cache knows, and is given no tensor to keep."""

        def ask(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
                raise ModegptError(f"the module hands tensors to `{name}` of the cache: only `update` is followed")
            return method(*args, **kwargs)

        return ask


@contextmanager
def opaque_calls(recorder: Recorder, passed_through: Sequence[str] = ()) -> Iterator[None]:
    """Within this context the attention interface is one opaque operator, whatever implementation is configured.

    passed_through: keyword arguments that the traced module received from its caller and only hands on.
    """

    def interface(self: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        def call(module, query, key, value, attention_mask=None, *, scaling=None, **kwargs):
            handed_on = tuple(name for name in kwargs if name in passed_through)
            own = {name: value for name, value in kwargs.items() if name not in handed_on}
            tensors = tuple(name for name, value in own.items() if isinstance(value, Tensor))
            constants = {name: value for name, value in own.items() if name not in tensors}
            index = recorder.add(
                AttentionCall(recorder.path_of(module), default, scaling, tensors, constants, handed_on)
            )
            scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else float(scaling)
            mask = attention_mask if isinstance(attention_mask, Tensor) else None
            extras = [own[name] for name in tensors]
            output = torch.ops.modegpt_graph.attention(query, key, value, mask, extras, scale, index)
            return output, AttentionWeights()

        return call

    with patch.object(AttentionInterface, "get_interface", interface):
        yield
