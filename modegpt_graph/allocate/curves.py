"""Ranks from measured curves: take away first what costs least per parameter."""

import heapq
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modegpt_graph.allocate.budget import Item, Target, meet
from modegpt_graph.errors import InputError


def allocate_by_curves(items: Sequence[Item], curves: Mapping[str, Tensor], target: Target) -> dict[str, int]:
    """Ranks that minimise Σ cost(rank) while the target goes.

    curves: cost of every item at rank 0..full_rank, (full_rank + 1,). Every curve is replaced by its lower convex hull
    over the allowed ranks; taking hull segments in the order of their cost per parameter is the optimum of the
    Lagrangian for every budget at once. The last segment is walked rank by rank.
    Raises InputError where the budget cannot be met within 0.5 percentage points or a curve is not finite.
    Source: Shoham and Gersho (1988), bit allocation by convex hulls.
    """
    left = target.amount(items)
    costs = {item.id: _costs(item, curves[item.id]) for item in items}
    ranks = {item.id: item.full_rank for item in items}
    hulls = {item.id: _hull(item, costs[item.id]) for item in items}
    queue: list[tuple[float, int, int]] = []  # (cost per parameter, index of the item, next hull point)
    for index, item in enumerate(items):
        _push(queue, hulls[item.id], costs[item.id], item, index, 1)
    while queue and left > 0:
        _, index, point = heapq.heappop(queue)
        item = items[index]
        start, end = hulls[item.id][point - 1], hulls[item.id][point]
        saved = (start - end) * item.cost_per_rank
        if saved <= left:
            ranks[item.id] = end
            left -= saved
            _push(queue, hulls[item.id], costs[item.id], item, index, point + 1)
        else:
            ranks[item.id] = item.nearest(max(start - left / item.cost_per_rank, float(end)))
            break

    def penalty(item: Item, rank: int, new: int) -> float:
        return costs[item.id][new] - costs[item.id][rank]

    return meet(items, ranks, target, penalty)


def _costs(item: Item, curve: Tensor) -> list[float]:
    if len(curve) != item.full_rank + 1:
        raise ValueError(f"{item.id}: {len(curve)} costs for ranks 0..{item.full_rank}")
    if not bool(torch.isfinite(curve).all()):
        raise InputError(f"{item.id}: what it costs is not finite")
    return curve.double().tolist()


def _hull(item: Item, costs: list[float]) -> list[int]:
    """Ranks of the lower convex hull of cost over rank, from full rank down."""
    hull: list[int] = []
    rank: int | None = item.full_rank
    while rank is not None:
        while len(hull) >= 2 and _slope(costs, hull[-2], hull[-1]) >= _slope(costs, hull[-1], rank):
            hull.pop()
        hull.append(rank)
        rank = item.below(rank)
    return hull


def _slope(costs: list[float], higher: int, lower: int) -> float:
    return (costs[lower] - costs[higher]) / (higher - lower)


def _push(
    queue: list[tuple[float, int, int]], hull: list[int], costs: list[float], item: Item, index: int, point: int
) -> None:
    if point < len(hull) and item.cost_per_rank:
        heapq.heappush(queue, (_slope(costs, hull[point - 1], hull[point]) / item.cost_per_rank, index, point))
