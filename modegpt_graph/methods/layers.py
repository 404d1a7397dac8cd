"""Whole decoder layers dropped: the residual stream passes them by."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.match.decoder import decoder_matrices
from modegpt_graph.methods.common import Pass, Setting, Smaller, Unavailable
from modegpt_graph.models import forward_logits


def shortgpt(setting: Setting) -> Pass:
    """Drop the layers with the least block influence, 1 − E cos(x_in, x_out), all at once.

    Source: ShortGPT (arXiv 2403.03853), section 3.
    """
    return _dropping(setting, setting.observed.importance.argsort(stable=True).tolist())


def _dropping(setting: Setting, order: Sequence[int]) -> Pass:
    costs, shapes = _layer_sizes(setting), _output_lengths(setting)

    def at(ratio: float) -> Smaller:
        dropped = order[: _how_many([costs[layer] for layer in order], ratio * setting.total)]
        smaller = copy.deepcopy(setting.dense)
        for layer in dropped:
            pass_by(smaller.get_submodule(setting.layers[layer]), shapes[layer])
        return Smaller(smaller, sum(costs[layer] for layer in dropped))

    return at


def _layer_sizes(setting: Setting) -> list[int]:
    """Matrix parameters of every decoder layer. Raises Unavailable where the model has no layers to drop."""
    if setting.layers == ("",):
        raise Unavailable("the model has no list of decoder layers to drop from")
    costs = [0] * len(setting.layers)
    for name, layer in decoder_matrices(setting.surveyed.trace).items():
        costs[layer] += setting.sizes.get(name, 0)
    return costs


def _how_many(costs: Sequence[int], target: float) -> int:
    """Layers to drop, in this order, to come nearest to `target` parameters; one layer stays."""
    removed = [sum(costs[:count]) for count in range(len(costs))]
    return min(range(len(removed)), key=lambda count: abs(removed[count] - target))


def _output_lengths(setting: Setting) -> list[int | None]:
    """How many values each layer returns as a tuple, None where it returns the stream alone."""
    found: dict[int, int | None] = {}

    def record(index: int):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            found[index] = len(output) if isinstance(output, tuple) else None

        return hook

    handles = [
        setting.dense.get_submodule(path).register_forward_hook(record(index))
        for index, path in enumerate(setting.layers)
    ]
    try:
        with torch.no_grad():
            forward_logits(setting.dense, setting.tokens[:1, :2])
    finally:
        for handle in handles:
            handle.remove()
    return [found.get(index) for index in range(len(setting.layers))]


def pass_by(layer: nn.Module, length: int | None) -> None:
    """Empty a layer and let it return the stream that it is given, in the form in which it returns its own.

    The layer stays in its list under its number: masks and rotations that the model chooses by number stay right.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        stream = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return stream if length is None else (stream, *(None for _ in range(length - 1)))

    layer._modules.clear()
    layer._parameters.clear()
    layer.forward = forward
