"""A module's shape without its weights: a copy in which every tensor lies on the meta device."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.errors import InputError


def skeleton_of(module: nn.Module) -> nn.Module:
    """A deep copy of `module` on the meta device, in evaluation mode; no tensor's data is copied.

    Tied parameters stay tied. Tensors held outside the parameter and buffer registries (plain attributes, and those in
    lists, tuples and dicts) go to the meta device too: one left behind would mix devices in the forward pass.
    """
    for name, part in module.named_modules():
        for own, tensor in vars(part).items():
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                path = ".".join(filter(None, [name, own]))
                raise InputError(
                    f"`{path}` is computed from parameters and kept, so the model cannot be copied; remove it "
                    "(torch.nn.utils.remove_weight_norm), or run the model under torch.no_grad()"
                )
    # deepcopy looks an object up here before it copies it: what is found stands for the copy, at every place of use.
    memo: dict[int, Any] = {
        id(tensor): _on_meta(tensor) for part in module.modules() for tensor in _tensors(vars(part).values())
    }
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:  # what a module of the user's holds may say no to a copy in any way
        raise InputError(
            f"the model cannot be copied: {type(error).__name__}: {error}; drop what it says from it"
        ) from error
    return copied.eval().requires_grad_(False)


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
