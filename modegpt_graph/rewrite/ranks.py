"""How the ratio is spread over the sites: the allocators by name."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from modegpt_graph.allocate.budget import Item, Target, ranks_for_ratios
from modegpt_graph.allocate.curves import allocate_by_curves
from modegpt_graph.allocate.entropic import entropic_ratios, uniform_ratios
from modegpt_graph.allocate.outliers import outlier_ratios
from modegpt_graph.calibrate.blocks import Block
from modegpt_graph.match.site_module import SiteModule
from modegpt_graph.progress import Progress
from modegpt_graph.rewrite.expected import expected_divergences, is_told
from modegpt_graph.rewrite.influence import influences
from modegpt_graph.rewrite.problem import Solver

ALLOCATORS = ("curves", "block-influence", "split-influence", "owl", "uniform")
TEMPERATURE = 0.15  # of the entropic allocation: on held-out text it beats what a largest layer ratio of 0.8 gives
PROBE_WINDOWS, PROBE_WINDOW = 2, 128  # tokens that sites are measured on
PROBE_LAYERS = 32  # of each kind of site
SMOOTH = 0.25  # how far, in logarithms, layers that are interpolated may be from what their neighbours predict
TINY = 1e-9  # nats; a smaller divergence is rounding
PROBE_RANK = 0.5  # share of the features that a site keeps while it is first measured
ROUNDS = 6  # of ranks that what was measured does not tell of


def layer_ranks(
    allocator: str,
    items: Sequence[Item],
    importance: Tensor,
    target: Target,
) -> dict[str, int]:
    """Ranks by a ratio per layer: `uniform`, or `block-influence` with the entropic closed form."""
    if allocator == "uniform":
        ratios = uniform_ratios(len(importance), target.ratio)
    else:
        ratios = entropic_ratios(importance, target.ratio, TEMPERATURE)
    return ranks_for_ratios(items, dict(enumerate(ratios.tolist())), target)


def block_ranks(
    items: Sequence[Item],
    blocks: Sequence[Block],
    influence: Sequence[float | None],
    importance: Tensor,
    target: Target,
) -> dict[str, int]:
    """`split-influence`: attention and MLP of a layer are scored apart, each weighing what its sites' parameters do.

    influence: of every block; one that could not be seen has its layer's importance.
    Source: MoDeGPT (arXiv 2408.09632), appendix B.11.
    """
    places = {site: number for number, block in enumerate(blocks) for site in block.sites}
    scores = [
        float(importance[block.layer or 0]) if score is None else score
        for block, score in zip(blocks, influence, strict=True)
    ]
    own = [item for item in items if item.id in places]
    sizes = torch.zeros(len(blocks), dtype=torch.float64)
    for item in own:
        sizes[places[item.id]] += item.removed(0)
    ratios = entropic_ratios(torch.tensor(scores), target.ratio, TEMPERATURE, weights=sizes)
    moved = [replace(item, layer=places[item.id]) for item in own]
    return ranks_for_ratios(moved, dict(enumerate(ratios.tolist())), target)


def outlier_ranks(
    items: Sequence[Item],
    shares: Tensor,
    target: Target,
) -> dict[str, int]:
    """`owl`: layers with more outliers keep more."""
    ratios = outlier_ratios(shares, target.ratio)
    return ranks_for_ratios(items, dict(enumerate(ratios.tolist())), target)


def curve_ranks(
    items: Sequence[Item],
    solvers: Mapping[str, Solver],
    weights: Mapping[str, float],
    measured: Mapping[str, Mapping[int, float]],
    measure: Callable[[Mapping[str, int]], Mapping[str, float]],
    target: Target,
) -> dict[str, int]:
    """Ranks that minimise the summed KL divergence that the sites' errors are expected to cause.

    weights: site → how much its divergence counts, 1 where it is left out.   measured: site → rank → divergence.
    measure: from sites at ranks that this does not tell of to their divergence; with it the ranks are found again,
    ROUNDS times at most.
    """
    known = {item.id: dict(measured[item.id]) for item in items}
    for last in (*[False] * ROUNDS, True):
        costs = {
            site: weights.get(site, 1.0) * expected_divergences(solvers[site].errors, own)
            for site, own in known.items()
        }
        ranks = allocate_by_curves(items, costs, target)
        doubtful = {
            site: ranks[site] for site, own in known.items() if not is_told(solvers[site].errors, own, ranks[site])
        }
        if last or not doubtful:
            break
        for site, divergence in measure(doubtful).items():
            known[site][ranks[site]] = divergence
    return ranks


def half_ranks(items: Sequence[Item]) -> dict[str, int]:
    """Where sites are measured first."""
    return {item.id: item.nearest(item.full_rank * PROBE_RANK) for item in items}


def probe_tokens(tokens: Tensor) -> Tensor:
    """A few short windows of calibration tokens (windows, window), on which sites are measured."""
    spread = torch.linspace(0, len(tokens) - 1, min(PROBE_WINDOWS, len(tokens))).round().long()
    return tokens[spread, :PROBE_WINDOW]


def half_rank_divergences(
    model: nn.Module,
    modules: Sequence[SiteModule],
    layers: Sequence[str],
    items: Sequence[Item],
    solvers: Mapping[str, Solver],
    tokens: Tensor,
    progress: Progress,
) -> dict[str, float]:
    """KL divergence that each site alone causes at half rank.

    Of sites of one kind every second layer is measured first. Where those predict each other, the layers between them
    are interpolated; else they are measured too, PROBE_LAYERS of each kind at most, so that the cost does not grow with
    depth.
    tokens: (windows, window) calibration tokens, of which a few short windows are used.
    """
    half, few = half_ranks(items), probe_tokens(tokens)
    patterns = {placed.site.id: placed.site.pattern for one in modules for placed in one.placed}
    kinds: dict[tuple[str, int, int], list[Item]] = {}
    for item in items:
        kinds.setdefault((patterns[item.id], item.full_rank, item.cost_per_rank), []).append(item)
    divergences: dict[str, float] = {}

    def measure(chosen: Iterable[Item]) -> None:
        probes = {item.id: solvers[item.id].solution(half[item.id]) for item in chosen if item.id not in divergences}
        if probes:
            divergences.update(influences(model, modules, layers, probes, few, progress))

    def known(alike: Sequence[Item]) -> dict[int, float]:
        return {item.layer or 0: divergences[item.id] for item in alike if item.id in divergences}

    wanted = {kind: probed([item.layer or 0 for item in alike]) for kind, alike in kinds.items()}
    first = {kind: {*every[:2], *every[2:-2:2], *every[-2:]} for kind, every in wanted.items()}
    measure(item for kind, alike in kinds.items() for item in alike if (item.layer or 0) in first[kind])
    rough = [kind for kind, alike in kinds.items() if roughness(known(alike)) > SMOOTH]
    measure(item for kind in rough for item in kinds[kind] if (item.layer or 0) in wanted[kind])
    for alike in kinds.values():
        points = known(alike)
        for item in alike:
            divergences.setdefault(item.id, interpolated(points, item.layer or 0))
    return divergences


def probed(layers: Sequence[int]) -> list[int]:
    """The layers to measure: the first and last two, which are unlike the others, and PROBE_LAYERS evenly in all."""
    ordered = sorted(set(layers))
    if len(ordered) <= PROBE_LAYERS:
        return ordered
    between = torch.linspace(2, len(ordered) - 3, PROBE_LAYERS - 4).round().long()
    return [*ordered[:2], *(ordered[index] for index in between), *ordered[-2:]]


def roughness(known: Mapping[int, float]) -> float:
    """Root mean square of how far, in logarithms, layers are from the interpolation of their neighbours.

    The first and last two are left out, which are always measured.
    """
    inner = sorted(known)[2:-2]
    if not inner:
        return 0.0
    missed = []
    for layer in inner:
        others = {at: value for at, value in known.items() if at != layer}
        missed.append(math.log(max(known[layer], TINY) / max(interpolated(others, layer), TINY)) ** 2)
    return math.sqrt(sum(missed) / len(missed))


def interpolated(known: Mapping[int, float], layer: int) -> float:
    """The geometric interpolation of the nearest layers on either side."""
    below, above = max(at for at in known if at <= layer), min(at for at in known if at >= layer)
    if below == above:
        return known[below]
    share = (layer - below) / (above - below)
    return known[below] ** (1 - share) * known[above] ** share
