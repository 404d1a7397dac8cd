"""How what a layer's consumers put out enters the residual stream, found from what one short pass shows."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modegpt_graph.calibrate.statistics import exact
from modegpt_graph.match.consumers import consumer_places
from modegpt_graph.match.site_module import SiteModule
from modegpt_graph.models import forward_logits

EXPLAINED = 0.02  # of a layer's change may be left over; bfloat16 rounds a sum of a few terms by less
SCALE_ROUNDS = 10
PROBE_TOKENS = 64


@dataclass(frozen=True)
class Entry:
    """A consumer's output o enters the stream as constant · o, or as constant · follower(o).

    follower: path of a module, in the model, that scales rows and columns and does nothing else (a norm without a
    mean): follower(o)_td = s_t · gains_d · o_td.   gains: (D,) float64, None without a follower.   is_normed: whether
    all rows of s_t · o_t are as long: then no consumer changes how much enters the stream.   parameter: name of a
    norm's own (D,) in which that is linear, column by column, and which nothing else has; None where there is none.
    """

    constant: float
    follower: str | None = None
    gains: Tensor | None = None
    is_normed: bool = False
    parameter: str | None = None


@dataclass
class _Layer:
    """What one layer was given, what its consumers put out, what modules made of that, and what came of it."""

    given: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    followed: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    result: Tensor | None = None


def stream_entries(
    model: nn.Module, layers: Sequence[str], consumers: Collection[str], tokens: Tensor
) -> dict[str, Entry]:
    """consumer → how it enters the stream, in the layers where x_out = x_in + Σ_j constant_j · branch_j.

    layers, consumers: paths.   tokens: (1, S) for one pass. Constants are found by least squares; a layer is taken
    where they leave nothing of its change. Consumers that are called more than once have no entry.
    """
    seen, calls = _watched(model, layers, consumers, tokens)
    entries: dict[str, Entry] = {}
    for layer in seen:
        if all(calls[path] == 1 for path in layer.outputs):
            entries |= _entries_of(layer, model, calls)
    return entries


def followed_consumers(
    model: nn.Module, modules: Sequence[SiteModule], layers: Sequence[str], tokens: Tensor
) -> dict[str, Entry]:
    """The consumers of sites that a norm follows, and how they enter the stream. tokens: (windows, window)."""
    entries = stream_entries(model, layers, consumer_places(model, modules), tokens[:1, :PROBE_TOKENS])
    return {path: entry for path, entry in entries.items() if entry.is_normed}


def layer_input(args: tuple, kwargs: dict) -> Tensor | None:
    """The hidden states that a layer was called with: the first tensor among its arguments."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def row_scales(output: Tensor, branch: Tensor, gains: Tensor) -> Tensor:
    """(T, 1) the s_t of a follower's `branch` (T, D) for a consumer's `output` (T, D)."""
    scaled = output * gains.to(output.dtype)
    return (scaled * branch).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True).clamp_min(1e-30)


def follower_scales(model: nn.Module, entry: Entry, output: Tensor) -> Tensor:
    """(T, 1) what an entry's follower in `model` scales a consumer's `output` (…, D) with, row by row."""
    assert entry.follower is not None
    assert entry.gains is not None
    branch = model.get_submodule(entry.follower)(output)
    return row_scales(exact(output).flatten(0, -2), exact(branch).flatten(0, -2), entry.gains)


def slopes_of(module: nn.Module, name: str, output: Tensor) -> Tensor:
    """(…, D) what one more of a parameter (D,) adds to what a module, linear in it, makes of `output`."""
    parameter = module.get_parameter(name)
    one, none = torch.ones_like(parameter), torch.zeros_like(parameter)
    return functional_call(module, {name: one}, (output,)) - functional_call(module, {name: none}, (output,))


def is_shared(model: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a model has a parameter under several names."""
    return sum(one is parameter for _, one in model.named_parameters(remove_duplicate=False)) > 1


def is_near(found: Tensor, wanted: Tensor) -> bool:
    """Whether what is found differs by rounding alone."""
    return float((found - wanted).norm()) < EXPLAINED * float(wanted.norm())


def _watched(
    model: nn.Module, layers: Sequence[str], consumers: Collection[str], tokens: Tensor
) -> tuple[list[_Layer], Counter[str]]:
    seen = {path: _Layer() for path in layers}
    running: list[str] = []
    calls: Counter[str] = Counter()

    def enter(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[path].given = layer_input(args, kwargs)
            running.append(path)

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[path].result = first if isinstance(first, Tensor) else None
            running.remove(path)

        return hook

    def called(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            calls[path] += 1
            if not running or not isinstance(output, Tensor):
                return
            layer = seen[running[-1]]
            for consumer, value in layer.outputs.items():
                if args and args[0] is value:
                    layer.followed[consumer] = (path, output)
            if path in consumers:
                layer.outputs[path] = output

        return hook

    handles = []
    try:
        for path in layers:
            layer = model.get_submodule(path)
            handles.append(layer.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(layer.register_forward_hook(leave(path)))
            for inner, module in layer.named_modules(prefix=path):
                if inner != path:
                    handles.append(module.register_forward_hook(called(inner)))
        with torch.no_grad():
            forward_logits(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen.values()), calls


def _entries_of(layer: _Layer, model: nn.Module, calls: Counter[str]) -> dict[str, Entry]:
    if layer.given is None or layer.result is None or not layer.outputs:
        return {}
    size = layer.given.numel()
    if any(value.numel() != size for value in (layer.result, *layer.outputs.values())):
        return {}
    change = (layer.result.double() - layer.given.double()).flatten()
    plain = {path: Entry(constant) for path, constant in _constants(change, layer.outputs).items()}
    if plain or not layer.followed:
        return plain
    branches = {path: layer.followed.get(path, (None, output)) for path, output in layer.outputs.items()}
    if any(value.numel() != size for _, value in branches.values()):
        return {}
    constants = _constants(change, {path: branch for path, (_, branch) in branches.items()})
    entries = {}
    for path, constant in constants.items():
        follower, branch = branches[path]
        if follower is None:
            entries[path] = Entry(constant)
            continue
        found = _scaling(layer.outputs[path], branch)
        if found is None or getattr(model.get_submodule(path), "bias", None) is not None:
            return {}
        gains, is_normed = found
        parameter = _parameter(model, follower, layer.outputs[path]) if is_normed and calls[follower] == 1 else None
        entries[path] = Entry(constant, follower, gains, is_normed, parameter)
    return entries


def _parameter(model: nn.Module, follower: str, output: Tensor) -> str | None:
    """Name of a parameter that a follower scales columns with, is linear in, and shares with nothing."""
    module, size = model.get_submodule(follower), output.shape[-1]
    with torch.no_grad():
        branch = module(output)
        for name, parameter in module.named_parameters():
            if parameter.shape == (size,) and not is_shared(model, parameter):
                start = functional_call(module, {name: torch.zeros_like(parameter)}, (output,))
                if is_near(start + parameter * slopes_of(module, name, output), branch):
                    return name
    return None


def _constants(change: Tensor, branches: dict[str, Tensor]) -> dict[str, float]:
    """The constants of least squares; none where they do not explain the change, or one overflows."""
    terms = torch.stack([branch.double().flatten() for branch in branches.values()], dim=1)  # (T·D, m)
    if not (terms.isfinite().all() and change.isfinite().all()):
        return {}
    found = torch.linalg.lstsq(terms, change[:, None]).solution[:, 0]
    left = float((change - terms @ found).norm() / change.norm().clamp_min(1e-300))
    if not left < EXPLAINED or float(found.abs().min()) < EXPLAINED:
        return {}
    return dict(zip(branches, found.tolist(), strict=True))


def _scaling(output: Tensor, branch: Tensor) -> tuple[Tensor, bool] | None:
    """The gains of a module that scales rows and columns, by alternating least squares; None of one that does more.

    With them whether it is a norm: most rows s_t · o_t have one length, but for the few so small that what a norm adds
    under its root tells.
    """
    output, branch = output.double().flatten(0, -2), branch.double().flatten(0, -2)
    scales = 1 / output.norm(dim=-1, keepdim=True).clamp_min(1e-30)  # those of a norm, but for a constant
    gains = torch.ones(output.shape[-1], dtype=torch.float64)
    for _ in range(SCALE_ROUNDS):
        scaled = output * scales
        gains = (scaled * branch).sum(0) / scaled.square().sum(0).clamp_min(1e-30)
        scales = row_scales(output, branch, gains)
    scaled = output * scales
    left = (branch - scaled * gains).norm() / branch.norm().clamp_min(1e-30)
    if not float(left) < EXPLAINED:
        return None
    lengths = scaled.norm(dim=-1)
    middle = lengths.median()
    return gains, float((lengths - middle).abs().median()) < EXPLAINED * float(middle)
