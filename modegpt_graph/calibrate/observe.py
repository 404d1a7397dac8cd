"""Run a model over calibration tokens, with every site observed where its features are consumed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import Collector, Statistics, collector
from modegpt_graph.codegen.emit import emit
from modegpt_graph.codegen.install import install
from modegpt_graph.match.modules import SiteModule
from modegpt_graph.models import forward_logits
from modegpt_graph.progress import NullProgress, Progress

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Calibrated:
    """statistics: site id → its Gram matrices.   importance: (L,) block influence of each decoder layer.

    tokens: how many were run.
    """

    statistics: Mapping[str, Statistics]
    importance: Tensor
    tokens: int


class _Finished(Exception):
    """The last decoder layer has been seen; nothing after it is needed."""


def calibrate(
    model: nn.Module,
    modules: Sequence[SiteModule],
    layers: Sequence[str],
    tokens: Tensor,
    progress: Progress | None = None,
) -> Calibrated:
    """Stream calibration tokens through `model` once and collect what every site needs.

    tokens: (windows, window).   layers: paths of the decoder layers. The pass ends at the last layer: the logits, a
    fifth of a small model's work, are not computed.
    Raises OverflowedActivations where a site sees values that are not finite.
    """
    collectors: dict[str, Collector] = {}
    similarity = [torch.zeros((), dtype=torch.float64) for _ in layers]
    batch = max(1, TOKENS_PER_BATCH // tokens.shape[1])
    with torch.no_grad(), _observed(model, modules, collectors), _influence(model, layers, similarity):
        with (progress or NullProgress()).stage("calibrate", len(tokens)) as stage:
            for windows in tokens.split(batch):
                try:
                    forward_logits(model, windows)
                except _Finished:
                    pass
                stage.advance(len(windows))
    statistics = {site: one.statistics(site) for site, one in collectors.items()}
    importance = 1 - torch.stack(similarity) / tokens.numel()
    return Calibrated(statistics, importance, tokens.numel())


@contextmanager
def _observed(
    model: nn.Module, modules: Sequence[SiteModule], collectors: dict[str, Collector]
) -> Iterator[None]:
    """Within this context the modules run as traced, and hand the observed values to their collectors."""
    changed: list[tuple[nn.Module, type[nn.Module], list[str]]] = []
    try:
        for one in modules:
            module = model.get_submodule(one.path)
            own = {placed.site.id: collector(placed.footprint) for placed in one.placed}
            collectors |= own
            observed = {f"{site}/{name}": node for site, c in own.items() for name, node in c.nodes.items()}
            forward = emit(one.trace, observed=observed)
            changed.append((module, type(module), ["observe", *forward.attributes, *forward.buffers]))
            install(module, forward, f"Observed{type(module).__name__}")
            module.observe = _dispatch(own)
        yield
    finally:
        for module, original, names in changed:
            module.__class__ = original
            for name in names:
                if name in module.__dict__ or name in module._buffers:
                    delattr(module, name)


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
