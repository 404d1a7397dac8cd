"""Run a model over calibration tokens, with every site observed where its features are consumed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from modegpt_graph.calibrate.inputs import ValueCollector, reads_one_value
from modegpt_graph.calibrate.norms import NormCollector
from modegpt_graph.calibrate.statistics import Collector, Statistics, added, collector, exact
from modegpt_graph.calibrate.stream import Entry, follower_scales
from modegpt_graph.codegen.emit import Forward, emit
from modegpt_graph.codegen.install import install
from modegpt_graph.codegen.join import joined, names_in, prefix_of
from modegpt_graph.errors import OverflowedActivations
from modegpt_graph.match.consumers import linear_path
from modegpt_graph.match.site_module import Placed, SiteModule
from modegpt_graph.models import forward_logits, overflow_advice
from modegpt_graph.progress import NullProgress, Progress

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Calibrated:
    """statistics: site id → its Gram matrices.   importance: (L,) block influence of each decoder layer.

    tokens: how many were run.   other: of the other text, where that is kept apart too.   followed: consumers at which
    tokens count as a norm that follows scales them.
    """

    statistics: Mapping[str, Statistics]
    importance: Tensor
    tokens: int
    other: Mapping[str, Statistics] = field(default_factory=dict)
    followed: int = 0

    def with_other(self, other: "Calibrated", apart: Iterable[str]) -> "Calibrated":
        """What was found on both texts, a token counting as much in one as in the other.

        other: of the other text.   apart: sites at which that is kept apart too.
        """
        tokens = self.tokens + other.tokens
        importance = (self.tokens * self.importance + other.tokens * other.importance) / tokens
        statistics = {site: added(one, other.statistics[site]) for site, one in self.statistics.items()}
        alone = {site: other.statistics[site] for site in apart}
        return replace(self, statistics=statistics, importance=importance, tokens=tokens, other=alone)


class _Finished(Exception):
    """The last decoder layer has been seen; nothing after it is needed."""


def calibrate(
    model: nn.Module,
    modules: Sequence[SiteModule],
    layers: Sequence[str],
    tokens: Tensor,
    progress: Progress | None = None,
    *,
    value_inputs: bool = False,
    followed: Mapping[str, Entry] = MappingProxyType({}),
) -> Calibrated:
    """Stream calibration tokens through `model` once and collect what every site needs.

    tokens: (windows, window).   layers: paths of the decoder layers. The pass ends at the last layer: the logits, a
    fifth of a small model's work, are not computed.
    value_inputs: whether the Gram matrix of what value projections read is collected too, for algorithm 3 of the paper.
    followed: consumer → how it enters the stream, of those that a norm follows. Tokens count there as it scales them,
    so that sums are of what enters the stream.
    Raises OverflowedActivations where a site sees values that are not finite.
    """
    collectors: dict[str, Collector] = {}
    similarity = [torch.zeros((), dtype=torch.float64) for _ in layers]
    batch = max(1, TOKENS_PER_BATCH // tokens.shape[1])
    stages = progress or NullProgress()
    with (
        torch.no_grad(),
        _observed(model, modules, collectors, value_inputs, followed),
        _influence(model, layers, similarity),
        stages.stage("calibrate", len(tokens)) as stage,
    ):
        for windows in tokens.split(batch):
            with suppress(_Finished):
                forward_logits(model, windows)
            stage.advance(len(windows))
    try:
        statistics = {site: one.statistics(site) for site, one in collectors.items()}
    except OverflowedActivations as error:
        raise OverflowedActivations(f"{error}; {overflow_advice(next(model.parameters()).dtype)}") from None
    importance = 1 - torch.stack(similarity) / tokens.numel()
    return Calibrated(statistics, importance, tokens.numel(), followed=len(followed))


@contextmanager
def _observed(
    model: nn.Module,
    modules: Sequence[SiteModule],
    collectors: dict[str, Collector],
    value_inputs: bool,
    followed: Mapping[str, Entry],
) -> Iterator[None]:
    """Within this context every site hands what its features are, where they are consumed, to its collector.

    What a projection reads is seen by a hook on it. Anything else is a value within a module, which runs as traced.
    """
    handles: list[torch.utils.hooks.RemovableHandle] = []
    restores: list[Callable[[], None]] = []
    try:
        for one in modules:
            module: Any = model.get_submodule(one.path)
            own = {placed.site.id: _collector(placed, value_inputs) for placed in one.placed}
            collectors |= own
            within: dict[str, fx.Node] = {}
            for site, observer in own.items():
                for name, node in observer.nodes.items():
                    reader = observer.readers.get(name)
                    path = None if reader is None else linear_path(model, one, reader)
                    if path is None:
                        within[f"{site}/{name}"] = node
                    elif path in followed:
                        hook = _weighed_hook(model, followed[path], partial(observer.add, name))
                        handles.append(model.get_submodule(path).register_forward_hook(hook))
                    else:
                        hook = _input_hook(observer, name)
                        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
            if within:
                forward = joined(emit(one.trace, observed=within), _observed_forks(one, within, value_inputs))
                restores.append(_restore(module))
                install(module, forward, f"Observed{type(module).__name__}")
                object.__setattr__(module, "observe", _dispatch(own))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for restore in restores:
            restore()


def _observed_forks(one: SiteModule, within: Mapping[str, fx.Node], value_inputs: bool) -> list[tuple[str, Forward]]:
    """The other ways through a module, each with the same values observed."""
    forks = []
    for number, (condition, fork) in enumerate(one.forks, 1):
        nodes = {
            key: node
            for placed in fork.placed
            for name, node in _collector(placed, value_inputs).nodes.items()
            if (key := f"{placed.site.id}/{name}") in within
        }
        forks.append((condition, emit(fork.trace, observed=nodes, prefix=prefix_of(number), known=names_in(condition))))
    return forks


def _collector(placed: Placed, value_inputs: bool) -> Collector:
    if placed.site.is_approximated:
        return NormCollector(placed.footprint)
    if value_inputs and placed.site.decomposition == "svd" and reads_one_value(placed.footprint):
        return ValueCollector(placed.footprint)
    return collector(placed.footprint)


def _input_hook(observer: Collector, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        observer.add(name, inputs[0])

    return observe


def _weighed_hook(
    model: nn.Module, entry: Entry, add: Callable[[Tensor], None]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Hands on what a consumer reads, each token times what the norm that follows scales its output with."""

    def observe(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        add(exact(inputs[0]).flatten(0, -2) * follower_scales(model, entry, output))

    return observe


def _restore(module: nn.Module) -> Callable[[], None]:
    """What puts a module back as it is now: its class, attributes and buffers."""
    original, attributes, buffers = type(module), dict(module.__dict__), dict(module._buffers)

    def restore() -> None:
        module.__class__ = original
        for name in module.__dict__.keys() - attributes.keys():
            object.__delattr__(module, name)
        module.__dict__.update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)

    return restore


def _dispatch(collectors: Mapping[str, Collector]) -> Callable[[str, Tensor], None]:
    def observe(key: str, value: Tensor) -> None:
        site, _, name = key.rpartition("/")
        collectors[site].add(name, value)

    return observe


@contextmanager
def _influence(model: nn.Module, layers: Sequence[str], similarity: list[Tensor]) -> Iterator[None]:
    """Sum the cosine similarity between input and output of every layer, over all tokens; stop after the last layer.

    Source: block influence, ShortGPT (arXiv 2403.03853); used for allocation by MoDeGPT, section 3.3.
    """
    handles = []

    def hook(index: int):
        def measure(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            before = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            after = output[0] if isinstance(output, tuple) else output
            if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape:
                cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
                similarity[index] += cosine.double().sum()
            if index == len(layers) - 1:
                raise _Finished

        return measure

    try:
        for index, path in enumerate(layers):
            handles.append(model.get_submodule(path).register_forward_hook(hook(index), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
