"""The figures of a compression that need no text: sizes, ranks and errors, counted on the models themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from modegpt_graph.calibrate.text import Calibration
from modegpt_graph.match.reasons import listed
from modegpt_graph.match.site_module import SiteModule
from modegpt_graph.report import words
from modegpt_graph.report.outcome import CompressionOutcome, Ratios, Reduction, SiteOutcome
from modegpt_graph.rewrite.apply import RewrittenModule
from modegpt_graph.rewrite.bounds import SiteBounds, site_bounds
from modegpt_graph.rewrite.budget import cache_bytes, parameter_count, site_items, stored_bytes
from modegpt_graph.rewrite.decomposed import Decomposed
from modegpt_graph.rewrite.recalibrate import Recalibration
from modegpt_graph.rewrite.solution import Solution, rank_of


@dataclass(frozen=True)
class Built:
    """A smaller model.

    first: the solutions that the sites' solvers gave.   solutions: those in place, some of them fitted again since.
    recalibration: what was fitted again, None where nothing was to be.
    """

    model: nn.Module
    rewritten: tuple[RewrittenModule, ...]
    first: Mapping[str, Solution]
    solutions: Mapping[str, Solution]
    recalibration: Recalibration | None = None

    @property
    def said(self) -> tuple[str, ...]:
        """What was done beside the sites, a sentence each."""
        again = self.recalibration
        if again is None:
            return ()
        counts = {"consumer": len(again.consumers), "producer": len(again.producers), "norm": again.norms}
        named = [words.plural(count, noun) for noun, count in counts.items() if count]
        what = f"{listed(named)} again, each where that leaves" if named else "nothing again: nowhere would that leave"
        fitted = f"Recalibration fitted {what} less on calibration text held out of the fit."
        if again.logit_scale is None:
            return (fitted,)
        return fitted, (
            f"The logits are scaled by {again.logit_scale:.3f}, in the last norm: so they tell most nearly what the "
            "dense model's do on the calibration text."
        )


def measure(
    decomposed: Decomposed,
    built: Built,
    ranks: Mapping[str, int],
    *,
    ratio: float,
    budget: str,
    preset: str,
    allocator: str,
    seed: int,
    text: Calibration,
) -> CompressionOutcome:
    """What was asked and what it came to.

    No proposition bounds the errors of solutions that were fitted again on what the smaller model reads: those sites
    have the bounds of their decompositions alone.
    """
    dense, modules, costs, smaller = decomposed.dense, decomposed.modules, decomposed.costs, built.model
    bounds = site_bounds(modules, decomposed.solvers, built.first)
    again = {site for site, solution in built.solutions.items() if solution is not built.first[site]}
    bounds = {site: replace(one, bounds=()) if site in again else one for site, one in bounds.items()}
    before, after = parameter_count(dense), parameter_count(smaller)
    inner = parameter_count(dense, without_embeddings=True)
    inner_after = parameter_count(smaller, without_embeddings=True)
    left = {name: total - decomposed.removed(ranks, name) for name, total in costs.totals.items()}
    left["bytes"] = stored_bytes(smaller)
    cached, cached_after = cache_bytes(dense), cache_bytes(smaller)
    if cached_after is not None:
        left["kv-cache"] = cached_after
    reductions = {name: Reduction(total, left[name]) for name, total in costs.totals.items()}
    return CompressionOutcome(
        ratio=ratio,
        preset=preset,
        allocator=allocator,
        seed=seed,
        calibration=text.description,
        ratios=Ratios(reductions["parameters"].share, 1 - inner_after / inner, 1 - after / before),
        parameters_before=before,
        parameters_after=after,
        sites=_sites(modules, built.solutions, bounds),
        fallback_reason=text.fallback_reason,
        bytes_before=costs.totals["bytes"],
        bytes_after=left["bytes"],
        cache_bytes_per_token_before=cached,
        cache_bytes_per_token_after=cached_after,
        budget=budget,
        reductions=reductions,
        context=costs.context,
        counted=costs.counted,
    )


def _sites(
    modules: Sequence[SiteModule], solutions: Mapping[str, Solution], bounds: Mapping[str, SiteBounds]
) -> tuple[SiteOutcome, ...]:
    items = {item.id: item for item in site_items(modules)}
    found = []
    for placed in (placed for one in modules for placed in one.placed):
        layout, item = placed.footprint.layout, items[placed.site.id]
        solution = solutions.get(placed.site.id)
        rank = layout.size if solution is None else rank_of(solution.kept, layout)
        error = 0.0 if solution is None else solution.relative_error
        sites = placed.site.apart()
        known = bounds.get(placed.site.id, SiteBounds((), ()))
        before, removed = item.removed(0) // len(sites), item.removed(rank) // len(sites)
        for number, site in enumerate(sites):
            tokens = None
            if solution is not None and solution.experts:
                error, tokens = solution.experts[number].relative_error, solution.experts[number].tokens
            bound = known.bounds[number] if known.bounds else None
            found.append(
                SiteOutcome(site.id, rank, layout.size, error, before, before - removed, tokens, bound, known.curve)
            )
    return tuple(found)
