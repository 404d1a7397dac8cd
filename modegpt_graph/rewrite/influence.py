"""What a unit of a site's error costs the model: KL divergence of the logits with one site reduced."""

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.match.site_module import Placed, SiteModule
from modegpt_graph.models import forward_logits
from modegpt_graph.models.precision import rounded_products
from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.rewrite.apply import rewrite
from modegpt_graph.rewrite.solution import Solution, spread_rows, taken
from modegpt_graph.trace.linear import Linear


def influences(
    model: nn.Module,
    modules: Sequence[SiteModule],
    layers: Sequence[str],
    solutions: Mapping[str, Solution],
    tokens: Tensor,
    progress: Progress | None = None,
) -> dict[str, float]:
    """KL(dense ‖ reduced) in nats per token for every site, reduced alone to its solution.

    The site's effect is folded into weights of the original shapes, and every run starts at the site's own layer, from
    the dense model's output of the layer before; at the first layer where layers hand one another more than their
    output. It is an estimate, of rounded products. tokens: (windows, window).
    """
    divergences: dict[str, float] = {}
    with torch.no_grad(), rounded_products():
        with _recorded(model, layers) as recorded:
            dense = forward_logits(model, tokens).log_softmax(-1)
        expected = dense.exp()
        entropy = -(expected * dense).sum(-1).mean()
        with (progress or NullProgress()).stage("weigh the sites", len(solutions)) as stage:
            for one in modules:
                for placed in one.placed:
                    if placed.site.id in solutions and placed.site.layer is not None:
                        with (
                            _starting_at(model, layers[placed.site.layer], recorded),
                            _lessened(model.get_submodule(one.path), one, placed, solutions[placed.site.id]),
                        ):
                            logits = forward_logits(model, tokens)
                        crossed = (logits.logsumexp(-1) - torch.linalg.vecdot(expected, logits)).mean()
                        divergences[placed.site.id] = max(float(crossed - entropy), 0.0)
                        stage.advance()
    return divergences


@dataclass
class _Recording:
    """One pass: what each layer returned, by path and call, and in which order layers began (True) and ended.

    shares: whether a layer put something into a dict or list that it was given: others may read it there.
    """

    outputs: dict[str, list[Any]] = field(default_factory=dict)
    events: list[tuple[str, bool]] = field(default_factory=list)
    shares: bool = False

    def before(self, path: str) -> list[str]:
        """Layers that had ended for good when `path` was first called, and of which nothing but the output is read."""
        if self.shares:
            return []
        begun = self.events.index((path, True)) if (path, True) in self.events else 0
        later = {other for other, _ in self.events[begun:]}
        return [other for other in self.outputs if other not in later]


@contextmanager
def _recorded(model: nn.Module, layers: Sequence[str]) -> Iterator[_Recording]:
    """The outputs of the decoder layers in the one pass that is run within this context."""
    recording = _Recording()
    given: list[object] = []

    def begin(path: str):
        def record(module: nn.Module, args: tuple, keywords: dict) -> None:
            recording.events.append((path, True))
            given.append(_contents(args, keywords))

        return record

    def end(path: str):
        def record(module: nn.Module, args: tuple, keywords: dict, output: Any) -> None:
            recording.events.append((path, False))
            recording.shares |= given.pop() != _contents(args, keywords)
            recording.outputs.setdefault(path, []).append(output)

        return record

    handles = []
    try:
        for path in layers:
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(begin(path), with_kwargs=True))
            handles.append(module.register_forward_hook(end(path), with_kwargs=True))
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _contents(args: tuple, keywords: Mapping[str, Any]) -> list[list[tuple[object, int]]]:
    """What is in the dicts and lists among a call's arguments."""
    given = [one for one in (*args, *keywords.values()) if isinstance(one, (MutableMapping, list))]
    entries = [one.items() if isinstance(one, MutableMapping) else enumerate(one) for one in given]
    return [[(key, id(value)) for key, value in one] for one in entries]


@contextmanager
def _starting_at(model: nn.Module, path: str, recording: _Recording) -> Iterator[None]:
    """In the one pass within this context, layers that end before `path` return what they did in the recorded one."""
    skipped = {other: model.get_submodule(other) for other in recording.before(path)}
    own = {other: vars(module)["forward"] for other, module in skipped.items() if "forward" in vars(module)}
    try:
        for other, module in skipped.items():
            said = iter(recording.outputs[other])
            module.forward = lambda *args, said=said, **kwargs: next(said)
        yield
    finally:
        for other, module in skipped.items():
            if other in own:
                module.forward = own[other]
            else:
                vars(module).pop("forward", None)


def _lessened(module: nn.Module, one: SiteModule, placed: Placed, solution: Solution) -> AbstractContextManager[None]:
    is_approximated = placed.site.is_approximated
    return _rewritten(module, one, placed, solution) if is_approximated else _reduced(module, placed, solution)


@contextmanager
def _rewritten(module: nn.Module, one: SiteModule, placed: Placed, solution: Solution) -> Iterator[None]:
    """Within this context the module computes what its rewritten copy does: no other form has that norm."""
    copied = copy.deepcopy(module)
    rewrite(copied, (replace(one, path="", placed=(placed,)),), {placed.site.id: solution})
    module.forward = copied.forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _reduced(module: nn.Module, placed: Placed, solution: Solution) -> Iterator[None]:
    """Within this context the module computes what it will after the rewrite, with weights of the original shapes."""
    changed: list[tuple[nn.Parameter, Tensor]] = []

    def change(linear: Linear, weight: Tensor, bias: Tensor | None) -> None:
        parameter = module.get_parameter(linear.weight)
        changed.append((parameter, parameter.data))
        parameter.data = linear.stored(weight, parameter.shape).to(parameter.dtype)
        if bias is not None and linear.bias is not None:
            parameter = module.get_parameter(linear.bias)
            changed.append((parameter, parameter.data))
            parameter.data = bias.view(parameter.shape).to(parameter.dtype)

    footprint, layout = placed.footprint, placed.footprint.layout
    sources = taken(layout, solution.kept)
    try:
        if footprint.outline.consumers:
            for role, linear in footprint.outline.consumers.items():
                rows, bias = solution.refits[role]
                weight, _ = linear.values(module)
                full = weight.mT.flatten(0, -2).double().clone()  # (N, D)
                full[layout.members[role].flatten()] = spread_rows(layout.size, sources, solution, rows)
                change(linear, _outputs_first(full, linear.experts), bias)
        else:
            role, linear = next(iter(footprint.outline.producers.items()))
            key = tuple(footprint.outline.producers)[1]
            operator = _operator(layout.members[role].shape[1], sources, solution, role, key, layout.size)
            members = layout.members[role]
            mixed = []
            for own in linear.values(module):
                rows = None if own is None else own.double()
                if rows is not None:
                    rows = rows.clone()
                    rows[members] = torch.einsum("ghde,ghd...->ghe...", operator, rows[members])
                mixed.append(rows)
            change(linear, *mixed)
        yield
    finally:
        for parameter, data in reversed(changed):
            parameter.data = data


def _outputs_first(spread: Tensor, experts: int | None) -> Tensor:
    """(D, N), or (experts, D, N) where the features of experts stand one after the other in (experts · N, D)."""
    return spread.T if experts is None else spread.view(experts, -1, spread.shape[-1]).mT


def _operator(heads: int, sources: Tensor, solution: Solution, query: str, key: str, size: int) -> Tensor:
    """(G, g, d, d) P such that the reduced scores are (Q P) Kᵀ."""
    groups, count = sources.shape
    chosen = torch.zeros(groups, 1, size, count, dtype=torch.float64)
    chosen.scatter_(2, sources[:, None, None], 1.0)
    left = solution.maps.get(query, chosen)
    right = solution.maps.get(key, chosen)
    return (left @ right.mT).expand(-1, heads, -1, -1)
