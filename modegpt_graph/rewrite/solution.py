"""What is done at one site: which features stay, and the matrices that go with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modegpt_graph.flow.layout import Layout


@dataclass(frozen=True)
class ExpertFit:
    """How one expert fared: its error over the tokens that were routed to it, None where there were none."""

    relative_error: float | None
    tokens: int


@dataclass(frozen=True)
class Solution:
    """A site's decomposition.

    kept: per kind, (G, n) blocks in their new order; the first n places of each kind stay and get their features.
    maps: selected role → (G, g, d, k): new features = old features · map; roles without one keep the chosen features.
    refits: refitted role → (weight (G, g, k, D), bias (D,) or None): its rows for the new features; without one, the
    rows of the kept features.
    relative_error: squared error of the pair's output on the calibration set, relative to the output.
    query_factor: (G, g, k) what the kept features of each head's queries are multiplied by, in the order of their
    slots, where a norm on them is approximated.
    exact_norm_error: the relative error if those norms knew what was dropped.
    rows: selected role → (G, g, k, D): its rows for the new features where they were fitted again.
    Where experts are solved together, each is a group, a bias is (G, D), and `experts` tells how each of them fared.
    """

    kept: tuple[Tensor, ...]
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    refits: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    relative_error: float | None = None
    query_factor: Tensor | None = None
    exact_norm_error: float | None = None
    experts: tuple["ExpertFit", ...] = ()
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    def of_copy(self, copy: int) -> "Solution":
        """What is done at one of the experts that are solved together."""
        return Solution(
            tuple(kept[copy : copy + 1] for kept in self.kept),
            {role: mapped[copy : copy + 1] for role, mapped in self.maps.items()},
            {
                role: (weight[copy : copy + 1], None if bias is None else bias[copy])
                for role, (weight, bias) in self.refits.items()
            },
            self.experts[copy].relative_error if self.experts else None,
        )


def slots(layout: Layout, counts: Sequence[int]) -> Tensor:
    """(G, k) places that stay where `counts[i]` blocks of kind i are kept, ascending."""
    places = [k.positions[:, :count].flatten(1) for k, count in zip(layout.kinds, counts, strict=True)]
    return torch.cat(places, dim=1).sort(dim=1).values


def taken(layout: Layout, kept: Sequence[Tensor]) -> Tensor:
    """(G, k) features that move into `slots`, in the order of the slots."""
    places, sources = [], []
    for kind, chosen in zip(layout.kinds, kept, strict=True):
        groups = torch.arange(layout.groups).view(-1, 1)
        places.append(kind.positions[:, : chosen.shape[1]].flatten(1))
        sources.append(kind.positions[groups, chosen].flatten(1))
    order = torch.cat(places, dim=1).argsort(dim=1)
    return torch.cat(sources, dim=1).gather(1, order)


def blocks_of(layout: Layout, counts: Sequence[int]) -> Tensor:
    """(G, k) which block the feature in each of `slots` belongs to; the blocks of all kinds are numbered through."""
    places, numbers, first = [], [], 0
    for kind, count in zip(layout.kinds, counts, strict=True):
        places.append(kind.positions[:, :count].flatten(1))
        numbers.append(torch.arange(first, first + count).repeat_interleave(kind.block_size).expand(layout.groups, -1))
        first += count
    return torch.cat(numbers, dim=1).gather(1, torch.cat(places, dim=1).argsort(dim=1))


def spread_rows(size: int, sources: Tensor, solution: Solution, rows: Tensor) -> Tensor:
    """(G·g·d, D) what a smaller consumer does to all features of a site, of which each group has `size`.

    sources: (G, k) features that are kept.   rows: (G, g, k, D).
    """
    groups, heads, _, width = rows.shape
    if solution.maps:
        return (next(iter(solution.maps.values())) @ rows).flatten(0, 2)  # (G, 1, d, k) · (G, g, k, D)
    full = rows.new_zeros(groups, heads, size, width)
    return full.scatter(2, sources[:, None, :, None].expand(-1, heads, -1, width), rows).flatten(0, 2)


def rank_of(kept: Sequence[Tensor], layout: Layout) -> int:
    """Features that each group keeps."""
    return sum(chosen.shape[1] * kind.block_size for chosen, kind in zip(kept, layout.kinds, strict=True))


def shuffled(layout: Layout, generator: torch.Generator) -> Solution:
    """Every feature kept, in random order: a rewrite that must change nothing."""
    kept = tuple(
        torch.stack([torch.randperm(kind.count, generator=generator) for _ in range(layout.groups)])
        for kind in layout.kinds
    )
    return Solution(kept)
