"""Whole decoder layers dropped: the residual stream passes them by."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.match.decoder import decoder_matrices
from modegpt_graph.methods.common import Pass, Setting, Smaller, Unavailable
from modegpt_graph.models import forward_logits

TRIAL_WINDOWS, TRIAL_WINDOW = 4, 256  # of the calibration text, on which every layer is tried


def shortgpt(setting: Setting) -> Pass:
    """Drop the layers with the least block influence, 1 − E cos(x_in, x_out), all at once.

    Source: ShortGPT (arXiv 2403.03853), section 3.
    """
    order = setting.observed.importance.argsort(stable=True).tolist()
    return _dropping(setting, order[:-1])  # one layer stays


def sleb(setting: Setting) -> Pass:
    """Drop layers one by one, each time the one without which the calibration text stays likeliest.

    A few short windows of the text are used: every step tries every layer that is left.
    Source: SLEB (arXiv 2402.09025), algorithm 1 with metric 3, the loss of the tokens that come next.
    """
    costs, shapes = _layer_sizes(setting), _output_lengths(setting)
    spread = torch.linspace(0, len(setting.tokens) - 1, min(TRIAL_WINDOWS, len(setting.tokens))).round().long()
    tokens, order = setting.tokens[spread, :TRIAL_WINDOW], []
    trial = copy.deepcopy(setting.dense)

    def at(ratio: float) -> Smaller:
        target = ratio * setting.total
        with setting.progress.stage("try every layer", None) as stage:
            while sum(costs[layer] for layer in order) < target and len(order) < len(costs) - 1:
                left = [layer for layer in range(len(costs)) if layer not in order]
                losses = losses_without(trial, [setting.layers[layer] for layer in left], tokens)
                order.append(left[losses.index(min(losses))])
                pass_by(trial.get_submodule(setting.layers[order[-1]]), shapes[order[-1]])
                stage.advance()
        return _without(setting, order, costs, shapes, target)

    return at


@torch.no_grad()
def losses_without(model: nn.Module, layers: Sequence[str], tokens: Tensor) -> list[float]:
    """Mean negative log-likelihood of `tokens` (windows, window) with each one of `layers` passed by, in their order.

    Layers before the one that is passed by are not run again: they return what they returned in a first run.
    """
    modules = [model.get_submodule(path) for path in layers]
    inputs, outputs = _seen(model, modules, tokens)
    losses = []
    try:
        for index, module in enumerate(modules):
            output = outputs[index]
            skipped = (inputs[index], *output[1:]) if isinstance(output, tuple) else inputs[index]
            module.forward = _returning(skipped)
            logits = forward_logits(model, tokens)[:, :-1]
            losses.append(float(nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())))
            module.forward = _returning(output)
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
    return losses


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


@torch.no_grad()
def _seen(model: nn.Module, modules: Sequence[nn.Module], tokens: Tensor) -> tuple[list[Tensor], list[Any]]:
    """The stream that each module is given, and what it returns."""
    inputs: list[Tensor] = []
    outputs: list[Any] = []

    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        inputs.append(_stream_of(args, kwargs))
        outputs.append(output)

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        forward_logits(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


def _dropping(setting: Setting, order: Sequence[int]) -> Pass:
    costs, shapes = _layer_sizes(setting), _output_lengths(setting)
    return lambda ratio: _without(setting, order, costs, shapes, ratio * setting.total)


def _without(
    setting: Setting, order: Sequence[int], costs: Sequence[int], shapes: Sequence[int | None], target: float
) -> Smaller:
    """The model without the first layers of `order`, as many as come nearest to `target` parameters."""
    dropped = order[: _how_many([costs[layer] for layer in order], target)]
    smaller = copy.deepcopy(setting.dense)
    for layer in dropped:
        pass_by(smaller.get_submodule(setting.layers[layer]), shapes[layer])
    return Smaller(smaller, sum(costs[layer] for layer in dropped))


def _layer_sizes(setting: Setting) -> list[int]:
    """Matrix parameters of every decoder layer. Raises Unavailable where the model has no layers to drop."""
    if setting.layers == ("",):
        raise Unavailable("the model has no list of decoder layers to drop from")
    costs = [0] * len(setting.layers)
    for name, layer in decoder_matrices(setting.surveyed.trace).items():
        costs[layer] += setting.sizes.get(name, 0)
    return costs


def _how_many(costs: Sequence[int], target: float) -> int:
    """Layers to drop, in this order, to come nearest to `target` parameters."""
    removed = [sum(costs[:count]) for count in range(len(costs) + 1)]
    return min(range(len(removed)), key=lambda count: abs(removed[count] - target))


def _output_lengths(setting: Setting) -> list[int | None]:
    """How many values each layer returns as a tuple, None where it returns the stream alone."""
    modules = [setting.dense.get_submodule(path) for path in setting.layers]
    _, outputs = _seen(setting.dense, modules, setting.tokens[:1, :2])
    if len(outputs) != len(modules):
        raise Unavailable("the decoder layers do not run once each: dropping one would drop several")
    return [len(output) if isinstance(output, tuple) else None for output in outputs]


def pass_by(layer: nn.Module, length: int | None) -> None:
    """Empty a layer and let it return the stream that it is given, in the form in which it returns its own.

    The layer stays in its list under its number: masks and rotations that the model chooses by number stay right.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        stream = _stream_of(args, kwargs)
        return stream if length is None else (stream, *(None for _ in range(length - 1)))

    layer._modules.clear()
    layer._parameters.clear()
    layer.forward = forward


def _stream_of(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The residual stream among a layer's arguments: the first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
