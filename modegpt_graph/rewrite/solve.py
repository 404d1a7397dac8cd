"""A site's statistics and matrices to its solution: which decomposition is called, in whose coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import ConsumerStatistics, ScoreStatistics, Statistics
from modegpt_graph.decompose.cr import Score, cr, cr_curve
from modegpt_graph.decompose.logits import Scale
from modegpt_graph.decompose.nystrom import Selection, nystrom
from modegpt_graph.decompose.refit import refit
from modegpt_graph.decompose.svd import query_key_svd
from modegpt_graph.decompose.value_output import value_output_svd
from modegpt_graph.errors import ModegptError
from modegpt_graph.flow.layout import Layout
from modegpt_graph.match.modules import Placed
from modegpt_graph.rewrite.solution import Solution
from modegpt_graph.trace.linear import Linear


@dataclass(frozen=True)
class Recipe:
    """How sites are decomposed.

    selection: how an MLP's features are chosen.   leverage_ridge: of the leverage scores, relative to the mean diagonal.
    ridge: of every refit, relative to the mean diagonal.   score, scale: how query/key blocks are chosen and scaled.
    """

    selection: Selection = "leverage"
    leverage_ridge: float = 1.0
    ridge: float = 1e-2
    score: Score = "greedy"
    scale: Scale = "none"


def solve(placed: Placed, module: nn.Module, statistics: Statistics, rank: int, recipe: Recipe) -> Solution:
    """The solution of one site at `rank` features a group.

    module: the traced module, with its weights.   Raises ModegptError where statistics and site do not fit.
    """
    site, layout = placed.site, placed.footprint.layout
    if isinstance(statistics, ScoreStatistics):
        if site.decomposition == "svd":
            return _query_key_svd(placed, statistics, rank)
        return _query_key_columns(placed, statistics, rank, recipe)
    (role, linear), *others = placed.footprint.outline.consumers.items()
    if others:
        raise ModegptError(f"{site.id}: {1 + len(others)} matrices are to be fitted again; one is supported")
    problem = _consumer_problem(module, linear, layout, role, statistics)
    if site.decomposition == "svd":
        return _consumer_svd(placed, problem, role, rank, recipe)
    return _consumer_columns(placed, problem, role, rank, recipe)


@dataclass(frozen=True)
class _Problem:
    """A consumer with its input features in the order (group, head, feature).

    gram: (N, N), or (N + 1, N + 1) where there is a bias.   weight: (N, D).
    """

    gram: Tensor
    weight: Tensor
    bias: Tensor | None


def _consumer_problem(
    module: nn.Module, linear: Linear, layout: Layout, role: str, statistics: ConsumerStatistics
) -> _Problem:
    weight = module.get_parameter(linear.weight).detach()
    weight = (weight if linear.transposed else weight.T).double()  # (N, D)
    bias = module.get_parameter(linear.bias).detach().double() if linear.bias else None
    order = layout.members[role].flatten()
    last = torch.tensor([weight.shape[0]]) if bias is not None else order[:0]
    rows = torch.cat([order, last])
    return _Problem(statistics.gram[rows][:, rows], weight[order], bias)


def _consumer_svd(placed: Placed, problem: _Problem, role: str, rank: int, recipe: Recipe) -> Solution:
    """Type III: a basis per group, and the consumer fitted again to all of them together."""
    layout = placed.footprint.layout
    groups, heads, size = layout.members[role].shape
    features = groups * heads * size
    blocks = torch.arange(features).view(groups, heads, size)
    grams = problem.gram[blocks[..., :, None], blocks[..., None, :]]
    output = problem.weight.view(groups, heads, size, -1)
    found = value_output_svd(grams, output, rank)
    basis = found.basis[:, None].expand(-1, heads, -1, -1).flatten(0, 1)  # (G·g, d, k)
    prior = found.output.flatten(0, 2)
    fitted = refit(problem.gram, basis, problem.weight, ridge=recipe.ridge, bias=problem.bias, prior=prior)
    weight = fitted.weight.view(groups, heads, rank, -1)
    maps = {role: found.basis[:, None] for role in placed.footprint.outline.producers}
    return Solution(_first(layout, rank), maps, {role: (weight, fitted.bias)}, fitted.relative_error)


def _consumer_columns(placed: Placed, problem: _Problem, role: str, rank: int, recipe: Recipe) -> Solution:
    """Type I: features chosen in every group, and the consumer fitted again to those that stay."""
    layout = placed.footprint.layout
    groups, heads, size = layout.members[role].shape
    if groups * heads == 1:
        found = nystrom(
            problem.gram,
            problem.weight,
            rank,
            ridge=recipe.ridge,
            selection=recipe.selection,
            leverage_ridge=recipe.leverage_ridge,
            bias=problem.bias,
        )
        weight = found.down.view(1, 1, rank, -1)
        return Solution((found.kept[None],), {}, {role: (weight, found.bias)}, found.relative_error)
    blocks = torch.arange(groups * heads * size).view(groups, heads, size)
    energy = problem.gram.diagonal()[: groups * heads * size] * problem.weight.square().sum(1)
    kept = energy[blocks].sum(1).topk(rank, dim=1).indices.sort(dim=1).values  # (G, k)
    columns = blocks.gather(2, kept[:, None].expand(-1, heads, -1)).flatten()
    fitted = refit(problem.gram, columns, problem.weight, ridge=recipe.ridge, bias=problem.bias)
    weight = fitted.weight.view(groups, heads, rank, -1)
    return Solution((kept,), {}, {role: (weight, fitted.bias)}, fitted.relative_error)


def _query_key_svd(placed: Placed, statistics: ScoreStatistics, rank: int) -> Solution:
    found = query_key_svd(statistics.queries, statistics.keys, rank)
    query, key = _sides(placed)
    heads = statistics.queries.shape[1]
    maps = {query: found.query_map[:, None].expand(-1, heads, -1, -1), key: found.key_map[:, None]}
    return Solution(_first(placed.footprint.layout, rank), maps, {}, found.relative_error)


def _query_key_columns(placed: Placed, statistics: ScoreStatistics, rank: int, recipe: Recipe) -> Solution:
    """Type II: whole blocks, the same ones in queries and keys."""
    layout = placed.footprint.layout
    order = canonical_order(layout)  # (G, d)
    queries, keys = in_order(statistics.queries, order), in_order(statistics.keys[:, None], order)[:, 0]
    blocks = canonical_blocks(layout)
    counts = block_counts(layout, queries, keys, rank, recipe)
    found = cr(queries, keys, blocks, counts, score=recipe.score, scale=recipe.scale)
    kept, first = [], 0
    for block, kind in zip(blocks, layout.kinds, strict=True):
        size = block.numel()
        inside = (found.kept >= first) & (found.kept < first + size)
        chosen = found.kept[inside].view(layout.groups, -1) - first
        kept.append(chosen[:, :: kind.block_size] // kind.block_size)
        first += size
    maps = {}
    if found.query_factor is not None:
        maps[_sides(placed)[0]] = _folded(layout, order, found.kept, found.query_factor)
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


def block_counts(layout: Layout, queries: Tensor, keys: Tensor, rank: int, recipe: Recipe) -> tuple[int, ...]:
    """Blocks of every kind that make up `rank` features, at least one of each."""
    if len(layout.kinds) == 1:
        return (max(1, rank // layout.kinds[0].block_size),)
    curve = cr_curve(queries, keys, canonical_blocks(layout), score=recipe.score, scale=recipe.scale)
    return tuple(max(1, count) for count in curve.counts_for(rank))


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


def _sides(placed: Placed) -> Sequence[str]:
    """The roles on the query and on the key side, in the order of the operands."""
    return tuple(placed.footprint.outline.producers)


