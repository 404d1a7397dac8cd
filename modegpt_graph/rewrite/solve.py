"""From a site's statistics and matrices to its solutions: which decomposition is called, in whose coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.norms import NormStatistics
from modegpt_graph.calibrate.statistics import ExpertStatistics, ScoreStatistics, Statistics
from modegpt_graph.decompose.cr import Score, cr, cr_curve
from modegpt_graph.decompose.elimination import Elimination, eliminate, eliminate_in_order
from modegpt_graph.decompose.logits import Scale
from modegpt_graph.decompose.nystrom import Selection, consumer, refit_rows, selection_order
from modegpt_graph.decompose.refit import refit
from modegpt_graph.decompose.shrinkage import chance_share, share_left, shrunk
from modegpt_graph.decompose.svd import query_key_svd
from modegpt_graph.decompose.value_output import value_output_svd
from modegpt_graph.errors import ModegptError
from modegpt_graph.flow.layout import Layout
from modegpt_graph.match.site_module import Placed
from modegpt_graph.rewrite.approximate_norm import ApproximateScoreBlocks
from modegpt_graph.rewrite.bounds import (
    BasisBounds,
    Bounds,
    ColumnsBounds,
    HeadColumnsBounds,
    ScoreBasisBounds,
    ScoreBlocksBounds,
)
from modegpt_graph.rewrite.experts import ExpertsSolver
from modegpt_graph.rewrite.problem import Problem, Solver, consumer_problem
from modegpt_graph.rewrite.shrunk import ShrunkSolver
from modegpt_graph.rewrite.solution import Solution


@dataclass(frozen=True)
class Recipe:
    """How sites are decomposed.

    selection: how an MLP's features are chosen.   score, scale: how query/key blocks are chosen and scaled.
    leverage_ridge, ridge: of the leverage scores and of every refit, relative to the mean diagonal.
    shrinkage: how far products of a consumer's different features are drawn towards zero before; 0 for none.
    """

    selection: Selection = "leverage"
    leverage_ridge: float = 1.0
    ridge: float = 1e-2
    score: Score = "greedy"
    scale: Scale = "none"
    shrinkage: float = 0.0


def solver(placed: Placed, module: nn.Module, statistics: Statistics, recipe: Recipe) -> Solver:
    """The solver that fits a site.

    module: the traced module, with its weights.   Raises ModegptError where statistics and site do not fit.
    """
    site, layout = placed.site, placed.footprint.layout
    if isinstance(statistics, ScoreStatistics):
        if site.decomposition == "svd":
            return ScoreBasis(placed, statistics)
        blocks = ScoreBlocks(placed, statistics, recipe)
        if isinstance(statistics, NormStatistics):
            return ApproximateScoreBlocks(placed, statistics, blocks.solution)
        return blocks
    (role, linear), *others = placed.footprint.outline.consumers.items()
    if others:
        raise ModegptError(f"{site.id}: {1 + len(others)} matrices are to be fitted again; one is supported")
    if isinstance(statistics, ExpertStatistics):
        experts = [_expert(placed, module, statistics, recipe, copy) for copy in range(linear.copies)]
        return ExpertsSolver(experts, statistics.tokens)
    seen = consumer_problem(module, linear, layout, role, statistics.gram)
    if not recipe.shrinkage:
        return _consumer_solver(placed, seen, recipe)
    supposed = consumer_problem(module, linear, layout, role, shrunk(statistics.gram, recipe.shrinkage))
    found = _consumer_solver(placed, supposed, recipe)
    return ShrunkSolver(seen, supposed, share_left(statistics.gram, recipe.shrinkage), layout, found)


def _consumer_solver(placed: Placed, problem: Problem, recipe: Recipe) -> Solver:
    if placed.site.decomposition == "svd":
        return ConsumerBasis(placed, problem, recipe)
    if placed.footprint.layout.members[problem.role][..., 0].numel() == 1:
        return ConsumerColumns(placed, problem, recipe)
    return ConsumerHeadColumns(placed, problem, recipe)


def _expert(placed: Placed, module: nn.Module, statistics: ExpertStatistics, recipe: Recipe, copy: int) -> ShrunkSolver:
    """One of the experts of a tensor; of one that saw no tokens the features with the largest weights are kept."""
    layout = placed.footprint.one
    alone = replace(placed, footprint=replace(placed.footprint, layout=layout))
    ((role, linear),) = placed.footprint.outline.consumers.items()
    gram = statistics.grams[copy]
    share = chance_share(gram)
    seen, supposed = (consumer_problem(module, linear, layout, role, one, copy) for one in (gram, shrunk(gram, share)))
    own = recipe if statistics.tokens[copy] else replace(recipe, selection="energy")
    return ShrunkSolver(seen, supposed, share_left(gram, share), layout, _consumer_solver(alone, supposed, own))


class ConsumerBasis:
    """Type III: a basis per group, and the consumer fitted again to all of them together."""

    def __init__(self, placed: Placed, problem: Problem, recipe: Recipe) -> None:
        self._placed, self._problem, self._recipe = placed, problem, recipe
        groups, heads, size = placed.footprint.layout.members[problem.role].shape
        blocks = torch.arange(groups * heads * size).view(groups, heads, size)
        self._grams = problem.gram[blocks[..., :, None], blocks[..., None, :]]
        self._output = problem.weight.view(groups, heads, size, -1)
        self._closed = value_output_svd(self._grams, self._output, size, sweeps=0)
        self.errors = self._closed.errors

    def bounds(self) -> Bounds:
        """Proposition 3."""
        seen = consumer(self._problem.gram, self._problem.weight, self._problem.bias)
        return BasisBounds(seen, self._grams, self._output, self._closed.basis, self._recipe.ridge)

    def solution(self, rank: int) -> Solution:
        """A basis of `rank` directions for every group."""
        problem = self._problem
        found = value_output_svd(self._grams, self._output, rank)
        heads = self._output.shape[1]
        basis = found.basis[:, None].expand(-1, heads, -1, -1).flatten(0, 1)  # (G·g, d, k)
        prior = found.output.flatten(0, 2)
        fitted = refit(problem.gram, basis, problem.weight, ridge=self._recipe.ridge, bias=problem.bias, prior=prior)
        weight = fitted.weight.view(*self._output.shape[:2], rank, -1)
        maps = dict.fromkeys(self._placed.footprint.outline.producers, found.basis[:, None])
        kept = _first(self._placed.footprint.layout, rank)
        return Solution(kept, maps, {problem.role: (weight, fitted.bias)}, fitted.relative_error)


class ConsumerColumns:
    """Type I: features of one group are chosen, and the consumer fitted again to those that stay."""

    def __init__(self, placed: Placed, problem: Problem, recipe: Recipe) -> None:
        self._seen, self._recipe = problem, recipe
        self._problem = consumer(problem.gram, problem.weight, problem.bias)

    @cached_property
    def _order(self) -> Tensor:
        """(N,) features, the first one to go first."""
        seen, recipe = self._seen, self._recipe
        if recipe.selection == "surgeon":
            return self._elimination.order
        leverage_ridge = recipe.leverage_ridge
        return selection_order(
            seen.gram, seen.weight, recipe.selection, ridge=recipe.ridge, leverage_ridge=leverage_ridge
        )

    @cached_property
    def _elimination(self) -> Elimination:
        problem, ridge = self._problem, self._recipe.ridge
        if self._recipe.selection == "surgeon":
            return eliminate(problem.gram, problem.weight, ridge=ridge, total=problem.total)
        return eliminate_in_order(problem.gram, problem.weight, self._order, ridge=ridge, total=problem.total)

    @property
    def errors(self) -> Tensor:
        """Found when first asked for: solutions do without."""
        return self._elimination.errors

    def bounds(self) -> Bounds:
        """Proposition 1."""
        return ColumnsBounds(self._problem, self._elimination)

    def solution(self, rank: int) -> Solution:
        """The `rank` features that go last."""
        kept = self._order[len(self._order) - rank :].sort().values
        found = refit_rows(self._problem, kept, self._recipe.ridge)
        weight = found.down.view(1, 1, rank, -1)
        return Solution((kept[None],), {}, {self._seen.role: (weight, found.bias)}, found.relative_error)


class ConsumerHeadColumns:
    """Type I with heads: each group keeps the features that carry most into the consumer, which is fitted again."""

    def __init__(self, placed: Placed, problem: Problem, recipe: Recipe) -> None:
        self._problem, self._recipe = problem, recipe
        groups, heads, size = placed.footprint.layout.members[problem.role].shape
        self._blocks = torch.arange(groups * heads * size).view(groups, heads, size)
        energy = problem.gram.diagonal()[: groups * heads * size] * problem.weight.square().sum(1)
        scores, self._order = energy[self._blocks].sum(1).sort(dim=1, descending=True)  # (G, d)
        left = scores.sum() - torch.cat([scores.new_zeros(1), scores.sum(0).cumsum(0)])
        self.errors = left.clamp_min(0) / scores.sum()

    def bounds(self) -> Bounds:
        """Proposition 1."""
        seen = consumer(self._problem.gram, self._problem.weight, self._problem.bias)
        return HeadColumnsBounds(seen, self._blocks, self._recipe.ridge)

    def solution(self, rank: int) -> Solution:
        """The `rank` strongest features of every group."""
        problem, blocks = self._problem, self._blocks
        kept = self._order[:, :rank].sort(dim=1).values  # (G, k)
        columns = blocks.gather(2, kept[:, None].expand(-1, blocks.shape[1], -1)).flatten()
        fitted = refit(problem.gram, columns, problem.weight, ridge=self._recipe.ridge, bias=problem.bias)
        weight = fitted.weight.view(*blocks.shape[:2], rank, -1)
        return Solution((kept,), {}, {problem.role: (weight, fitted.bias)}, fitted.relative_error)


class ScoreBasis:
    """Query/key with nothing in between: the SVD of their product."""

    def __init__(self, placed: Placed, statistics: ScoreStatistics) -> None:
        self._placed, self._statistics = placed, statistics
        self.errors = query_key_svd(statistics.queries, statistics.keys, statistics.keys.shape[-1]).errors

    def bounds(self) -> Bounds:
        """Proposition 3."""
        return ScoreBasisBounds(self._statistics.queries, self._statistics.keys)

    def solution(self, rank: int) -> Solution:
        """The `rank` strongest directions of every group."""
        found = query_key_svd(self._statistics.queries, self._statistics.keys, rank)
        query, key = self._placed.footprint.outline.producers
        heads = self._statistics.queries.shape[1]
        maps = {query: found.query_map[:, None].expand(-1, heads, -1, -1), key: found.key_map[:, None]}
        return Solution(_first(self._placed.footprint.layout, rank), maps, {}, found.relative_error)


class ScoreBlocks:
    """Type II: whole blocks, the same ones in queries and keys."""

    def __init__(self, placed: Placed, statistics: ScoreStatistics, recipe: Recipe) -> None:
        self._placed, self._recipe = placed, recipe
        self._layout = layout = placed.footprint.layout
        self._order = canonical_order(layout)  # (G, d)
        self._queries = in_order(statistics.queries, self._order)
        self._keys = in_order(statistics.keys[:, None], self._order)[:, 0]
        self._blocks = canonical_blocks(layout)
        self._curve = cr_curve(self._queries, self._keys, self._blocks, score=recipe.score, scale=recipe.scale)
        self.errors = torch.tensor([self._curve.error_at(rank) for rank in range(layout.size + 1)], dtype=torch.float64)

    def bounds(self) -> Bounds:
        """Proposition 2."""
        recipe = self._recipe
        return ScoreBlocksBounds(self._queries, self._keys, self._blocks, self._curve, recipe.score, recipe.scale)

    def solution(self, rank: int) -> Solution:
        """Blocks of every kind that make up `rank` features, at least one of each kind."""
        layout, recipe = self._layout, self._recipe
        counts = exact_counts(layout, self._curve.counts_for(rank), rank)
        found = cr(self._queries, self._keys, self._blocks, counts, score=recipe.score, scale=recipe.scale)
        kept, first = [], 0
        for kind in layout.kinds:
            size = kind.count * kind.block_size
            inside = (found.kept >= first) & (found.kept < first + size)
            chosen = found.kept[inside].view(layout.groups, -1) - first
            kept.append(chosen[:, :: kind.block_size] // kind.block_size)
            first += size
        maps = {}
        if found.query_factor is not None:
            query = next(iter(self._placed.footprint.outline.producers))
            maps[query] = _folded(layout, self._order, found.kept, found.query_factor)
        return Solution(tuple(kept), maps, {}, found.relative_error)


def _folded(layout: Layout, order: Tensor, kept: Tensor, factor: Tensor) -> Tensor:
    """(G, g, d, k) map that keeps columns and multiplies them by a factor, in the order of the places that stay."""
    groups, heads, count, _ = factor.shape
    columns = order.gather(1, kept)  # (G, k) places of the kept columns, in canonical order
    places = order.gather(1, _first_places(layout, kept, order))  # (G, k) the places that stay, in the same order
    mapped = torch.zeros(groups, heads, layout.size, count, dtype=torch.float64)
    mapped.scatter_(2, columns[:, None, :, None].expand(-1, heads, -1, count), factor)
    ascending = places.argsort(dim=1)
    return mapped.gather(3, ascending[:, None, None].expand(-1, heads, layout.size, -1))


def _first_places(layout: Layout, kept: Tensor, order: Tensor) -> Tensor:
    """(G, k) canonical positions of the blocks that stay: the first ones of every kind."""
    first, found = 0, []
    for kind in layout.kinds:
        size = kind.count * kind.block_size
        count = int(((kept[0] >= first) & (kept[0] < first + size)).sum())
        found.append(torch.arange(first, first + count))
        first += size
    return torch.cat(found).expand(layout.groups, -1)


def exact_counts(layout: Layout, counts: Sequence[int], rank: int) -> tuple[int, ...]:
    """Counts of blocks near the given ones that make up `rank` features, at least one of each kind."""
    sizes, available = [kind.block_size for kind in layout.kinds], [kind.count for kind in layout.kinds]
    exact = [max(1, count) for count in counts]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        missing = rank - sum(count * size for count, size in zip(exact, sizes, strict=True))
        steps = int(missing / sizes[index])  # towards zero
        exact[index] = min(max(exact[index] + steps, 1), available[index])
    return tuple(exact)


def canonical_order(layout: Layout) -> Tensor:
    """(G, d) places of every group's features, kind by kind and block by block."""
    return torch.cat([kind.positions.flatten(1) for kind in layout.kinds], dim=1)


def canonical_blocks(layout: Layout) -> list[Tensor]:
    """Per kind, (n, b) places of its blocks in canonical order."""
    blocks, first = [], 0
    for kind in layout.kinds:
        size = kind.count * kind.block_size
        blocks.append(torch.arange(first, first + size).view(kind.count, kind.block_size))
        first += size
    return blocks


def in_order(grams: Tensor, order: Tensor) -> Tensor:
    """Grams (G, h, d, d) with their features reordered by (G, d)."""
    heads, size = grams.shape[1], grams.shape[-1]
    rows = order[:, None, :, None].expand(-1, heads, -1, size)
    columns = order[:, None, None, :].expand(-1, heads, size, -1)
    return grams.gather(2, rows).gather(3, columns)


def _first(layout: Layout, rank: int) -> tuple[Tensor, ...]:
    return (torch.arange(rank).expand(layout.groups, -1),)
