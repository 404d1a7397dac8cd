"""Ranks by layer for each kind of site: what the charts of console and HTML draw."""

from collections.abc import Sequence
from dataclasses import dataclass

from modegpt_graph.match.sites import Analysis
from modegpt_graph.report.outcome import CompressionOutcome, SiteOutcome
from modegpt_graph.report.words import roles_line

MARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class LayerRank:
    """One layer of one kind. kept: share of the features kept; rank and full_rank: means over the layer's sites."""

    layer: int
    kept: float
    rank: float
    full_rank: float
    relative_error: float | None


@dataclass(frozen=True)
class RankSeries:
    """One kind of site (pattern and roles) over the layers, ascending."""

    pattern: str
    roles: str
    layers: tuple[LayerRank, ...]

    @property
    def span(self) -> str:
        """`812-1,480 of 1,536`, the smallest and the largest rank."""
        ranks = [layer.rank for layer in self.layers]
        full = [layer.full_rank for layer in self.layers]
        return f"{_between(ranks)} of {_between(full)}"


def rank_series(analysis: Analysis, outcome: CompressionOutcome) -> tuple[RankSeries, ...]:
    """Kinds in the order in which the analysis has them. Sites outside the repeated layers are not drawn."""
    by_id = {site.id: site for site in outcome.sites}
    kinds: dict[tuple[str, str], dict[int, list[SiteOutcome]]] = {}
    for site in analysis.sites:
        if site.layer is not None and site.id in by_id:
            kind = kinds.setdefault((site.pattern, roles_line(site)), {})
            kind.setdefault(site.layer, []).append(by_id[site.id])
    return tuple(
        RankSeries(pattern, roles, tuple(_layer(number, layers[number]) for number in sorted(layers)))
        for (pattern, roles), layers in kinds.items()
    )


def sparkline(shares: Sequence[float], width: int) -> tuple[str, int]:
    """One mark for each share in 0..1, or for the mean of neighbours so that they fit `width`; and of how many."""
    each = max(1, -(-len(shares) // max(1, width)))
    means = [_mean(shares[start : start + each]) for start in range(0, len(shares), each)]
    return "".join(MARKS[min(len(MARKS) - 1, max(0, int(mean * len(MARKS))))] for mean in means), each


def _layer(number: int, sites: list[SiteOutcome]) -> LayerRank:
    errors = [site.relative_error for site in sites if site.relative_error is not None]
    return LayerRank(
        layer=number,
        kept=_mean([site.rank / site.full_rank for site in sites]),
        rank=_mean([site.rank for site in sites]),
        full_rank=_mean([site.full_rank for site in sites]),
        relative_error=_mean(errors) if errors else None,
    )


def _between(values: list[float]) -> str:
    low, high = round(min(values)), round(max(values))
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
