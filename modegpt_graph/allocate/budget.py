"""From ratios per layer to whole ranks that meet a budget."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modegpt_graph.errors import InputError

TOLERANCE = 0.005
EXCHANGED, EXCHANGES = 8, 64  # steps made together where single ones are too coarse, and sums kept at each
PARAMETERS = "the decoder layers' matrices"  # what a ratio is of, where nothing else is said


@dataclass(frozen=True)
class Item:
    """Something that has a rank: a site, or the part of one that is given its own.

    full_rank: what it has today.   cost_per_rank: what each rank less saves: parameters, or what else a budget is of;
    0 where it saves nothing, and then it stays whole.
    minimum: the least rank it may be left with.   multiple: ranks below full are multiples of this (blocks, hardware
    tiles).
    """

    id: str
    layer: int | None
    full_rank: int
    cost_per_rank: int
    minimum: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.full_rank < 1 or not 0 <= self.minimum <= self.full_rank or self.multiple < 1:
            raise ValueError(
                f"{self.id}: rank {self.minimum}..{self.full_rank} in multiples of {self.multiple} is impossible"
            )

    def lowest(self) -> int:
        """The least rank that `minimum` and `multiple` allow."""
        rounded = -(-self.minimum // self.multiple) * self.multiple
        return min(rounded, self.full_rank)

    def below(self, rank: int) -> int | None:
        """The next lower rank that is allowed, None at the lowest."""
        lower = (rank - 1) // self.multiple * self.multiple
        return lower if lower >= self.lowest() and rank > self.lowest() else None

    def above(self, rank: int) -> int | None:
        """The next higher rank that is allowed, None at full rank."""
        return None if rank >= self.full_rank else min((rank // self.multiple + 1) * self.multiple, self.full_rank)

    def nearest(self, rank: float) -> int:
        """The allowed rank nearest to `rank`."""
        lower = min(max(int(rank // self.multiple) * self.multiple, self.lowest()), self.full_rank)
        higher = self.above(lower)
        return higher if higher is not None and abs(higher - rank) < abs(lower - rank) else lower

    def removed(self, rank: int) -> int:
        """What goes, of what the budget is of, when `rank` is what is left."""
        return (self.full_rank - rank) * self.cost_per_rank


@dataclass(frozen=True)
class Target:
    """How much is to go: `ratio` of `total`.

    of: what `total` counts, in words.   tolerance: how far from the ratio what goes may be.
    """

    total: int
    ratio: float
    of: str = PARAMETERS
    tolerance: float = TOLERANCE

    def amount(self, items: Sequence[Item]) -> float:
        """What is to go; InputError where the items cannot give it."""
        if len({item.id for item in items}) != len(items):
            raise ValueError("two items have the same id")
        if self.total < 1 or not 0 <= self.ratio < 1:
            raise InputError(f"ratio {self.ratio:g} of {self.total:,}, which is {self.of}: the ratio must be in 0..1")
        if self.ratio > reachable_ratio(items, self.total):
            raise InputError(
                f"ratio {self.ratio:g} cannot be reached: the sites found can give at most "
                f"{reachable_ratio(items, self.total):.4f} of {self.of}; ask for less"
            )
        return self.ratio * self.total


Penalty = Callable[[Item, int, int], float]


def removed_cost(items: Sequence[Item], ranks: Mapping[str, int]) -> int:
    """What goes with these ranks."""
    return sum(item.removed(ranks[item.id]) for item in items)


def ranks_for_ratios(items: Sequence[Item], layer_ratios: Mapping[int | None, float], target: Target) -> dict[str, int]:
    """Ranks such that the target goes, shared between layers as `layer_ratios` says.

    layer_ratios: ratio of every layer that has an item; all are scaled by one factor, because some parameters of a
    layer may be in no item and some items may reach their minimum. Rounding is then repaired by single steps, the ones
    that bring an item nearest to its own ratio first.
    Raises InputError, naming the largest (or nearest) reachable ratio, where the budget cannot be met within 0.5
    percentage points.
    """
    amount = target.amount(items)
    missing = sorted({str(item.layer) for item in items if item.layer not in layer_ratios})
    if missing:
        raise ValueError(f"no ratio for layer {', '.join(missing)}")

    def ideal(item: Item, factor: float) -> float:
        if not item.cost_per_rank:
            return float(item.full_rank)
        return max(item.full_rank * (1 - factor * layer_ratios[item.layer]), float(item.lowest()))

    def removed(factor: float) -> float:
        return sum((item.full_rank - ideal(item, factor)) * item.cost_per_rank for item in items)

    low, high = 0.0, 1.0
    while removed(high) < amount and high < 1e9:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle) < amount else (low, middle)
    ideals = {item.id: ideal(item, high) for item in items}
    ranks = {item.id: item.nearest(ideals[item.id]) for item in items}

    def penalty(item: Item, rank: int, new: int) -> float:
        """How much farther from its ideal, as a share of its full rank, the item gets."""
        return (abs(new - ideals[item.id]) - abs(rank - ideals[item.id])) / item.full_rank

    return meet(items, ranks, target, penalty)


def meet(items: Sequence[Item], ranks: Mapping[str, int], target: Target, penalty: Penalty) -> dict[str, int]:
    """Single steps, then exchanges of a few steps, that bring what is removed nearer to the target.

    penalty(item, rank, new_rank): what a step costs per se; of the steps that bring the budget nearer, the one with the
    least penalty per parameter goes first, until none brings it nearer.
    Raises InputError where what is reached is farther from the target than it tolerates.
    """
    ranks = dict(ranks)
    gap = target.amount(items) - removed_cost(items, ranks)  # positive: too little goes
    lowering: bool | None = None
    queue: list[tuple[float, int, int, int]] = []  # (penalty per parameter, item, new rank, parameters moved)

    def push(index: int) -> None:
        item, rank = items[index], ranks[items[index].id]
        new = item.below(rank) if lowering else item.above(rank)
        if new is not None and item.cost_per_rank:
            moved = item.removed(new) - item.removed(rank)
            heapq.heappush(queue, (penalty(item, rank, new) / abs(moved), index, new, moved))

    while gap:
        if lowering is not (gap > 0):
            lowering, queue = gap > 0, []
            for index in range(len(items)):
                push(index)
        while queue and abs(gap - queue[0][3]) >= abs(gap):
            heapq.heappop(queue)  # steps too coarse for this gap stay too coarse, since the gap only shrinks
        if not queue:
            break
        _, index, new, moved = heapq.heappop(queue)
        ranks[items[index].id] = new
        gap -= moved
        push(index)
    if abs(gap) > TOLERANCE / 2 * target.total:
        gap = _exchange(items, ranks, gap)
    if abs(gap) > target.tolerance * target.total:
        reached = removed_cost(items, ranks) / target.total
        raise InputError(
            f"ratio {target.ratio:.3f} falls between two steps of rank; the nearest that can be met is {reached:.4f}"
        )
    return ranks


def _exchange(items: Sequence[Item], ranks: dict[str, int], gap: float) -> float:
    """Lower some items and raise others, while that closes the gap; steps of different size make finer ones together.

    All sums of up to EXCHANGED steps are tried, breadth first, each sum once; the first of the smallest is taken.
    """
    best, choice = gap, dict(ranks)
    seen, front = {gap}, [(gap, dict(ranks))]
    for _ in range(EXCHANGED):
        following: list[tuple[float, dict[str, int]]] = []
        for left, own in front:
            for moved, (item, new) in _steps(items, own).items():
                if left - moved not in seen:
                    seen.add(left - moved)
                    following.append((left - moved, own | {item.id: new}))
        front = sorted(following, key=lambda one: abs(one[0]))[:EXCHANGES]
        if front and abs(front[0][0]) < abs(best):
            best, choice = front[0]
    ranks.update(choice)
    return best


def _steps(items: Sequence[Item], ranks: Mapping[str, int]) -> dict[int, tuple[Item, int]]:
    """What one step moves → an item that can make it, and its new rank."""
    steps: dict[int, tuple[Item, int]] = {}
    for item in items:
        for new in (item.below(ranks[item.id]), item.above(ranks[item.id])):
            if new is not None and item.cost_per_rank:
                steps.setdefault(item.removed(new) - item.removed(ranks[item.id]), (item, new))
    return steps


def reachable_ratio(items: Sequence[Item], total: int) -> float:
    """The largest ratio that these items can give."""
    return sum(item.removed(item.lowest()) for item in items) / total
