"""How the ratio is spread over the sites: the allocators by name."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modegpt_graph.allocate.budget import Item, ranks_for_ratios
from modegpt_graph.allocate.curves import allocate_by_curves
from modegpt_graph.allocate.entropic import entropic_ratios, uniform_ratios
from modegpt_graph.match.modules import SiteModule
from modegpt_graph.progress import Progress
from modegpt_graph.rewrite.influence import influences
from modegpt_graph.rewrite.solve import Solver

ALLOCATORS = ("curves", "block-influence", "uniform")
TEMPERATURE = 0.15  # of the entropic allocation: on held-out text it beats what a largest layer ratio of 0.8 gives
PROBE_WINDOWS, PROBE_WINDOW = 2, 192  # tokens that sites are weighed on
PROBE_LAYERS = 32  # of each kind of site
PROBE_RANK = 0.5  # share of the features that a site keeps while it is weighed


def layer_ranks(
    allocator: str, items: Sequence[Item], importance: Tensor, total_parameters: int, ratio: float
) -> dict[str, int]:
    """Ranks by a ratio per layer: `uniform`, or `block-influence` with the entropic closed form."""
    if allocator == "uniform":
        ratios = uniform_ratios(len(importance), ratio)
    else:
        ratios = entropic_ratios(importance, ratio, TEMPERATURE)
    return ranks_for_ratios(items, dict(enumerate(ratios.tolist())), total_parameters, ratio)


def curve_ranks(
    items: Sequence[Item],
    solvers: Mapping[str, Solver],
    weights: Mapping[str, float],
    total_parameters: int,
    ratio: float,
) -> dict[str, int]:
    """Ranks that minimise the summed KL divergence that the sites' errors are expected to cause."""
    curves = {site: one.errors for site, one in solvers.items()}
    return allocate_by_curves(items, curves, weights, total_parameters, ratio)


def site_weights(
    model: nn.Module,
    modules: Sequence[SiteModule],
    layers: Sequence[str],
    items: Sequence[Item],
    solvers: Mapping[str, Solver],
    tokens: Tensor,
    progress: Progress,
) -> dict[str, float]:
    """KL divergence per unit of a site's error, measured with each site alone at half rank.

    Sites of one kind change little from layer to layer: of each kind PROBE_LAYERS layers are measured, and those
    between them are interpolated, so that the cost does not grow with depth.
    tokens: (windows, window) calibration tokens, of which a few short windows are used.
    """
    spread = torch.linspace(0, len(tokens) - 1, min(PROBE_WINDOWS, len(tokens))).round().long()
    half = {item.id: item.nearest(item.full_rank * PROBE_RANK) for item in items}
    patterns = {placed.site.id: placed.site.pattern for one in modules for placed in one.placed}
    kinds: dict[tuple[str, int, int], list[Item]] = {}
    for item in items:
        kinds.setdefault((patterns[item.id], item.full_rank, item.parameters_per_rank), []).append(item)
    measured = {kind: probed([item.layer or 0 for item in alike]) for kind, alike in kinds.items()}
    probes = {
        item.id: solvers[item.id].solution(half[item.id])
        for kind, alike in kinds.items()
        for item in alike
        if (item.layer or 0) in measured[kind]
    }
    divergences = influences(model, modules, layers, probes, tokens[spread, :PROBE_WINDOW], progress)
    weights = {}
    for alike in kinds.values():
        known = {item.layer or 0: divergences[item.id] for item in alike if item.id in divergences}
        for item in alike:
            divergence = divergences.get(item.id, interpolated(known, item.layer or 0))
            probe = probes.get(item.id)
            error = float(solvers[item.id].errors[half[item.id]]) if probe is None else probe.relative_error
            weights[item.id] = divergence / max(error or 0.0, 1e-12)
    return weights


def probed(layers: Sequence[int]) -> set[int]:
    """The layers to measure: the first and last two, which are unlike the others, and PROBE_LAYERS evenly in all."""
    ordered = sorted(set(layers))
    if len(ordered) <= PROBE_LAYERS:
        return set(ordered)
    between = torch.linspace(2, len(ordered) - 3, PROBE_LAYERS - 4).round().long()
    return {*ordered[:2], *ordered[-2:], *(ordered[index] for index in between)}


def interpolated(known: Mapping[int, float], layer: int) -> float:
    """The geometric interpolation of the nearest layers on either side."""
    below, above = max(at for at in known if at <= layer), min(at for at in known if at >= layer)
    if below == above:
        return known[below]
    share = (layer - below) / (above - below)
    return known[below] ** (1 - share) * known[above] ** share
