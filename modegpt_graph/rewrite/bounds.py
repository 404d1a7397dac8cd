"""What propositions 1 to 3 say of a site's errors, from the statistics that its solver was given."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from modegpt_graph.decompose.bound_curves import (
    column_scores,
    cr_bounds,
    nystrom_bounds,
    projection_bound,
    query_key_bounds,
    value_output_bounds,
)
from modegpt_graph.decompose.cr import CrCurve, Score
from modegpt_graph.decompose.elimination import Elimination
from modegpt_graph.decompose.logits import Scale
from modegpt_graph.decompose.numerics import energy, mean_diagonal, ratio_of
from modegpt_graph.decompose.nystrom import Consumer
from modegpt_graph.decompose.value_output import fit_outputs
from modegpt_graph.match.site_module import SiteModule
from modegpt_graph.rewrite.solution import Solution, rank_of

SHARES = (0.25, 0.5, 0.75, 0.875)  # of the features: where a curve is told


class Bounds(ABC):
    """What the errors of one site can be at most."""

    @cached_property
    @abstractmethod
    def curve(self) -> Tensor | None:
        """(d + 1,) of the solver's `errors`; None where no proposition speaks of them."""

    @abstractmethod
    def of(self, solution: Solution) -> tuple[float | None, ...]:
        """Of a solution's relative error; one for each of experts that are solved together."""


class Bounded(Protocol):
    """A solver: errors at every rank, and what they can be at most, None where no proposition fits the site."""

    @property
    def errors(self) -> Tensor: ...

    def bounds(self) -> Bounds | None: ...


SLACK, RELATIVE_SLACK = 1e-9, 1e-6  # of rounding, in errors and bounds that are meant to be equal


def is_within(error: float, bound: float) -> bool:
    """Whether a relative error is at most its bound, up to rounding. Not where either is not a number."""
    return error <= bound * (1 + RELATIVE_SLACK) + SLACK


@dataclass(frozen=True)
class BoundPoint:
    """A site's decomposition at one rank: its own relative error on the calibration set, and what that can be at most.

    For heads of attention outputs these are of each head alone; a site's `relative_error` is of all heads together.
    """

    rank: int
    relative_error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the bound, up to rounding."""
        return is_within(self.relative_error, self.bound)


@dataclass(frozen=True)
class SiteBounds:
    """One bound for each site that a solution stands for, None without a proposition, and a short curve."""

    bounds: tuple[float | None, ...]
    curve: tuple[BoundPoint, ...]


def site_bounds(
    modules: Sequence[SiteModule], solvers: Mapping[str, Bounded], solutions: Mapping[str, Solution]
) -> dict[str, SiteBounds]:
    """Site → what propositions 1 to 3 say of it; sites that no proposition fits are left out."""
    found = {}
    for placed in (placed for one in modules for placed in one.placed):
        solver, solution = solvers[placed.site.id], solutions.get(placed.site.id)
        bounds = solver.bounds()
        if bounds is not None:
            of = () if solution is None else bounds.of(solution)
            layout = placed.footprint.layout
            rank = None if solution is None else rank_of(solution.kept, layout)
            step = layout.block_size if len(layout.kinds) == 1 else 1
            curve = () if bounds.curve is None else _points(solver.errors, bounds.curve, rank, step)
            found[placed.site.id] = SiteBounds(of, curve)
    return found


def _points(errors: Tensor, bounds: Tensor, chosen: int | None, step: int) -> tuple[BoundPoint, ...]:
    size = len(errors) - 1
    ranks = {*(round(size * share / step) * step for share in SHARES), chosen or 0} - {0, size}
    return tuple(BoundPoint(rank, float(errors[rank]), float(bounds[rank])) for rank in sorted(ranks))


@dataclass(frozen=True, eq=False)
class ColumnsBounds(Bounds):
    """Proposition 1: columns are dropped in a known order, and the consumer is fitted again."""

    problem: Consumer
    found: Elimination

    @cached_property
    def curve(self) -> Tensor:
        problem, found = self.problem, self.found
        most = nystrom_bounds(problem.gram, problem.weight, found.order, found.ridge, found.leaves)
        return _relative(most, problem.total)

    def of(self, solution: Solution) -> tuple[float | None, ...]:
        return (float(self.curve[solution.kept[0].shape[1]]),)


@dataclass(frozen=True, eq=False)
class HeadColumnsBounds(Bounds):
    """Proposition 1 for the columns that a solution keeps; the solver's curve is of errors before the refit.

    blocks: (G, g, d) input columns of the consumer.   ridge: relative to the mean diagonal.
    """

    problem: Consumer
    blocks: Tensor
    ridge: float

    @cached_property
    def curve(self) -> None:
        return None

    def of(self, solution: Solution) -> tuple[float | None, ...]:
        seen, chosen = self.problem, solution.kept[0]
        kept = self.blocks.gather(2, chosen[:, None].expand(-1, self.blocks.shape[1], -1)).flatten()
        dropped = torch.ones(len(seen.weight), dtype=torch.bool)
        dropped[kept] = False
        order = torch.cat([dropped.nonzero()[:, 0], kept])
        most = nystrom_bounds(seen.gram, seen.weight, order, self.ridge * mean_diagonal(seen.gram))
        return (ratio_of(float(most[len(kept)]), seen.total),)


@dataclass(frozen=True, eq=False)
class BasisBounds(Bounds):
    """Proposition 3: for each head on its own, which the curve is of, and for the consumer fitted again to all heads.

    problem: the consumer of all heads.   grams: (G, g, d, d).   output: (G, g, d, D).   nested: (G, d, d) the basis
    that the solver's errors are of.   ridge: relative to the mean diagonal.
    """

    problem: Consumer
    grams: Tensor
    output: Tensor
    nested: Tensor
    ridge: float

    @cached_property
    def curve(self) -> Tensor:
        most = value_output_bounds(self.grams, self.output, self.nested)
        return _relative(most, float(energy(self.grams, self.output).sum()))

    def of(self, solution: Solution) -> tuple[float | None, ...]:
        seen, heads = self.problem, self.output.shape[1]
        basis = next(iter(solution.maps.values()))[:, 0]  # (G, d, k)
        prior = basis[:, None] @ fit_outputs(self.grams, basis, self.grams @ self.output)
        spread = basis[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
        ridge = self.ridge * mean_diagonal(seen.gram)
        return (ratio_of(projection_bound(seen.gram, seen.weight, spread, prior.flatten(0, 2), ridge), seen.total),)


@dataclass(frozen=True, eq=False)
class ValueBounds(Bounds):
    """Proposition 3 for the paper's own objective, which leaves out what attention mixes: a solution's error, which is
    of what attention puts out, has no bound.

    grams: (G, g, d, d) of the values that each output head reads.   output: (G, g, d, D).   nested: (G, d, d).
    """

    grams: Tensor
    output: Tensor
    nested: Tensor

    @cached_property
    def curve(self) -> Tensor:
        most = value_output_bounds(self.grams, self.output, self.nested)
        return _relative(most, float(energy(self.grams, self.output).sum()))

    def of(self, solution: Solution) -> tuple[float | None, ...]:
        return (None,)


@dataclass(frozen=True, eq=False)
class ScaledBounds(Bounds):
    """Bounds of a solver that supposes another Gram matrix than was seen: its curve is of what it supposes.

    scale: a squared error over what was seen is at most so many times the bound; None where that is not known.
    """

    supposed: Bounds
    scale: float | None

    @cached_property
    def curve(self) -> Tensor | None:
        return self.supposed.curve

    def of(self, solution: Solution) -> tuple[float | None, ...]:
        known = self.supposed.of(solution)
        return tuple(None if one is None or self.scale is None else one * self.scale for one in known)


@dataclass(frozen=True, eq=False)
class ExpertBounds(Bounds):
    """Experts in one tensor: their curve is of what all put out, a bound is of each alone, over the tokens it saw.

    shares: (E,) of each in what all put out.
    """

    bounds: tuple[Bounds, ...]
    shares: Tensor

    @cached_property
    def curve(self) -> Tensor | None:
        curves = [bounds.curve for bounds in self.bounds]
        known = [curve for curve in curves if curve is not None]
        if len(known) < len(curves):
            return None
        return (self.shares[:, None] * torch.stack(known)).sum(0)

    def of(self, solution: Solution) -> tuple[float | None, ...]:
        return tuple(bounds.of(solution.of_copy(copy))[0] for copy, bounds in enumerate(self.bounds))


@dataclass(frozen=True, eq=False)
class ScoreBasisBounds(Bounds):
    """Proposition 3 for queries (G, g, d, d) and keys (G, d, d) with nothing in between."""

    queries: Tensor
    keys: Tensor

    @cached_property
    def curve(self) -> Tensor:
        return _relative(query_key_bounds(self.queries, self.keys), _logits(self.queries, self.keys))

    def of(self, solution: Solution) -> tuple[float | None, ...]:
        return (float(self.curve[solution.kept[0].shape[1]]),)


@dataclass(frozen=True, eq=False)
class ScoreBlocksBounds(Bounds):
    """Proposition 2, queries (G, g, d, d) and keys (G, d, d) in the order that `blocks` number."""

    queries: Tensor
    keys: Tensor
    blocks: list[Tensor]
    found: CrCurve
    score: Score
    scale: Scale

    @cached_property
    def curve(self) -> Tensor:
        most = cr_bounds(self.queries, self.keys, self.blocks, self.found, score=self.score, scale=self.scale)
        steps = [self.found.step_at(rank) for rank in range(self.keys.shape[-1] + 1)]
        return _relative(most[steps], _logits(self.queries, self.keys))

    def of(self, solution: Solution) -> tuple[float | None, ...]:
        kinds: Sequence[tuple[Tensor, Tensor]] = list(zip(self.blocks, solution.kept, strict=True))
        if len(kinds) == 1:
            return (float(self.curve[kinds[0][1].shape[1] * kinds[0][0].shape[1]]),)
        # With several kinds, those that stay need not be those of the curve.
        dropped = column_scores(self.queries, self.keys)
        for blocks, kept in kinds:
            dropped = dropped.scatter(1, blocks[kept].flatten(1), 0.0)
        return (ratio_of(float(dropped.sum(1).square().sum()), _logits(self.queries, self.keys)),)


def _logits(queries: Tensor, keys: Tensor) -> float:
    """Σ ‖Q Kᵀ‖² over groups and heads."""
    return float((queries.sum(1) * keys).sum())


def _relative(most: Tensor, total: float) -> Tensor:
    """Bounds as shares of a total, 0 where nothing was there to lose."""
    return most / total if total > 0 else torch.zeros_like(most)
