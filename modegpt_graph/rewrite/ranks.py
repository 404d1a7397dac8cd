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
PROBE_WINDOWS, PROBE_WINDOW = 2, 128  # tokens that sites are weighed on
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

    tokens: (windows, window) calibration tokens, of which a few short windows are used.
    """
    spread = torch.linspace(0, len(tokens) - 1, min(PROBE_WINDOWS, len(tokens))).round().long()
    probe = tokens[spread, :PROBE_WINDOW]
    halved = {item.id: solvers[item.id].solution(item.nearest(item.full_rank * PROBE_RANK)) for item in items}
    divergences = influences(model, modules, layers, halved, probe, progress)
    return {site: kl / max(halved[site].relative_error or 0.0, 1e-12) for site, kl in divergences.items()}
