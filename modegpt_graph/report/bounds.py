"""Theory beside measurement: errors and what propositions 1 to 3 allow them to be, folded by kind of site."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from modegpt_graph.match.sites import Analysis
from modegpt_graph.report import words
from modegpt_graph.report.outcome import CompressionOutcome, SiteOutcome
from modegpt_graph.report.words import roles_line

PROPOSITIONS = {"nystrom": 1, "cr": 2, "svd": 3}
EXPLAINED = (
    "Squared errors on the calibration text, relative to what the pair puts out. A bound is computed from the same "
    "statistics, and says how far the theory is from the measurement: an error above its bound would be a bug."
)


@dataclass(frozen=True)
class Spread:
    """Least, median and largest of some figures."""

    least: float
    middle: float
    largest: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        return Spread(min(values), median(values), max(values))

    def __str__(self) -> str:
        low, high = words.short_figure(self.least), words.short_figure(self.largest)
        return low if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class CurveAt:
    """Errors and bounds of all sites of a kind with this share of their features kept."""

    kept: float
    error: Spread
    bound: Spread


@dataclass(frozen=True)
class BoundSeries:
    """One kind of site (pattern and roles) with a proposition that speaks of it.

    error, bound, looseness: of the sites that were made smaller, looseness being bound over error; None without any.
    curve: over the share of features kept.   chosen: (share kept, error, bound) of every site that was made smaller.
    violated: ids of sites with an error above its bound.
    """

    pattern: str
    roles: str
    proposition: int
    sites: int
    error: Spread | None
    bound: Spread | None
    looseness: Spread | None
    curve: tuple[CurveAt, ...]
    chosen: tuple[tuple[float, float, float], ...]
    violated: tuple[str, ...]


def bound_series(analysis: Analysis, outcome: CompressionOutcome) -> tuple[BoundSeries, ...]:
    """Kinds in the order in which the analysis has them; those without a bound are left out."""
    by_id = {site.id: site for site in outcome.sites}
    kinds: dict[tuple[str, str, int], list[SiteOutcome]] = {}
    for site in analysis.sites:
        found = by_id.get(site.id)
        if found is not None and found.bound_holds is not None and site.decomposition is not None:
            key = (site.pattern, roles_line(site), PROPOSITIONS[site.decomposition])
            kinds.setdefault(key, []).append(found)
    return tuple(_series(*key, sites) for key, sites in kinds.items())


def violations(outcome: CompressionOutcome) -> tuple[str, ...]:
    """Ids of sites with an error above its bound."""
    return tuple(site.id for site in outcome.sites if site.bound_holds is False)


def violation_line(ids: Sequence[str]) -> str:
    """One sentence that names the sites, a few of them where there are many."""
    named = ", ".join(ids[:3]) + (f" and {len(ids) - 3:,} more" if len(ids) > 3 else "")
    return f"An error is above its bound, which is a bug of this tool: {named}. Please report it with this report."


def _series(pattern: str, roles: str, proposition: int, sites: Sequence[SiteOutcome]) -> BoundSeries:
    pairs = [pair for one in sites if one.rank < one.full_rank and (pair := _chosen(one)) is not None]
    errors, bounds = [error for _, error, _ in pairs], [bound for _, _, bound in pairs]
    ratios = [bound / error for _, error, bound in pairs if error > 0]
    return BoundSeries(
        pattern,
        roles,
        proposition,
        len(sites),
        Spread.of(errors) if errors else None,
        Spread.of(bounds) if bounds else None,
        Spread.of(ratios) if ratios else None,
        _curve(sites),
        tuple(pairs),
        tuple(one.id for one in sites if one.bound_holds is False),
    )


def _chosen(site: SiteOutcome) -> tuple[float, float, float] | None:
    """(share kept, error, bound) at the rank that was chosen: of the site, or of its decomposition where only that has
    a bound.
    """
    kept = site.rank / site.full_rank
    if site.bound is not None and site.relative_error is not None:
        return kept, site.relative_error, site.bound
    points = (point for point in site.curve if point.rank == site.rank)
    return next(((kept, point.relative_error, point.bound) for point in points), None)


def _curve(sites: Sequence[SiteOutcome]) -> tuple[CurveAt, ...]:
    """At the shares that every site has a point at: the chosen ones differ from site to site."""
    shares = [{point.rank / one.full_rank: point for point in one.curve} for one in sites]
    common = set.intersection(*(set(points) for points in shares)) if shares else set()
    return tuple(
        CurveAt(
            share,
            Spread.of([points[share].relative_error for points in shares]),
            Spread.of([points[share].bound for points in shares]),
        )
        for share in sorted(common)
    )
