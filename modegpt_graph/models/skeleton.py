"""A module's shape without its weights: a copy in which every tensor lies on the meta device."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def skeleton_of(module: nn.Module) -> nn.Module:
    """A deep copy of `module` on the meta device, in evaluation mode; no tensor's data is copied.

    Tied parameters stay tied. Tensors held outside the parameter and buffer registries (plain attributes, and those in
    lists, tuples and dicts) go to the meta device too: one left behind would mix devices in the forward pass.
    """
    # deepcopy looks an object up here before it copies it: what is found stands for the copy, at every place of use.
    memo: dict[int, Any] = {
        id(tensor): _on_meta(tensor) for part in module.modules() for tensor in _tensors(vars(part).values())
    }
    return copy.deepcopy(module, memo).eval().requires_grad_(False)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=False)
    return empty
