"""The layout of a site: its features as groups × blocks, and which rows and columns of matrices belong to each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modegpt_graph.errors import ModegptError
from modegpt_graph.flow.classes import Classes


class LayoutError(ModegptError):
    """The features of a site do not form regular groups."""


@dataclass(frozen=True)
class Kind:
    """Blocks of one size that are interchangeable within a group.

    positions: (G, n, b) places of each block's members in the group's feature axis.
    """

    positions: Tensor

    @property
    def count(self) -> int:
        return self.positions.shape[1]

    @property
    def block_size(self) -> int:
        return self.positions.shape[2]


@dataclass(frozen=True, eq=False)
class Layout:
    """Features of a site. G groups (heads that share a matrix) of d features each.

    fibres: (G, d) the class of every feature.   kinds: how each group's features fall into blocks.
    members: role → (G, g, d) row (or, for a refitted role, input column) of the role's parameter that carries each
    feature, for each of the g heads of the group.
    """

    fibres: Tensor
    kinds: tuple[Kind, ...]
    members: Mapping[str, Tensor]

    @property
    def groups(self) -> int:
        return self.fibres.shape[0]

    @property
    def size(self) -> int:
        return self.fibres.shape[1]

    @property
    def block_size(self) -> int:
        return max(kind.block_size for kind in self.kinds)

    def equals(self, other: "Layout") -> bool:
        """Whether the same rows and columns carry the same features, in the same blocks."""
        return (
            self.members.keys() == other.members.keys()
            and all(torch.equal(rows, other.members[role]) for role, rows in self.members.items())
            and len(self.kinds) == len(other.kinds)
            and all(torch.equal(a.positions, b.positions) for a, b in zip(self.kinds, other.kinds, strict=True))
        )


def repeated(layout: Layout, copies: int, sizes: Mapping[str, int]) -> Layout:
    """The layout of `copies` equal sites in one tensor, whose groups are those of the first, the second, and so on.

    sizes: role → rows (for a refitted role, input columns) of one copy; those of all copies are numbered through.
    """
    apart = int(layout.fibres.max()) + 1

    def shifted(values: Tensor, step: int) -> Tensor:
        return torch.cat([values + copy * step for copy in range(copies)])

    members = {role: shifted(rows, sizes[role]) for role, rows in layout.members.items()}
    kinds = tuple(Kind(shifted(kind.positions, 0)) for kind in layout.kinds)
    return Layout(shifted(layout.fibres, apart), kinds, members)


def unique_fibres(classes: Tensor) -> Tensor:
    """(heads, d) → (G, d): fibres without repeats, in order of their first appearance.

    Raises LayoutError where two fibres share some of their classes but not all.
    """
    seen: dict[int, Tensor] = {}
    for fibre in classes.reshape(-1, classes.shape[-1]):
        first = int(fibre.min())
        if first in seen and not torch.equal(seen[first].sort().values, fibre.sort().values):
            raise LayoutError("two heads share some features but not all of them")
        seen.setdefault(first, fibre)
    if sum(len(fibre.unique()) for fibre in seen.values()) != len(classes.unique()):
        raise LayoutError("two heads share some features but not all of them")
    return torch.stack(list(seen.values()))


def kinds_of(fibres: Tensor) -> tuple[Kind, ...]:
    """Blocks of each group by size, largest first: the positions that share a class must be kept or dropped together.

    Raises LayoutError where the groups differ in how many blocks of a size they have.
    """
    by_size: dict[int, list[list[Tensor]]] = {}
    for group, fibre in enumerate(fibres):
        _, inverse, counts = fibre.unique(return_inverse=True, return_counts=True)
        order = torch.argsort(inverse, stable=True)
        blocks = sorted(torch.split(order, counts.tolist()), key=lambda block: int(block[0]))
        for block in blocks:
            by_size.setdefault(len(block), [[] for _ in fibres])[group].append(block)
    kinds = []
    for size in sorted(by_size, reverse=True):
        groups = by_size[size]
        if len({len(blocks) for blocks in groups}) != 1:
            raise LayoutError(f"the heads differ in how many blocks of {size} features they have")
        kinds.append(Kind(torch.stack([torch.stack(blocks) for blocks in groups])))
    return tuple(kinds)


def members_of(fibres: Tensor, carried: Tensor, carriers: Tensor) -> Tensor:
    """(G, g, d) which rows carry each feature, for each of the g heads of a group.

    carried: (R,) class of each of R rows.   carriers: (R,) their indices in the parameter.
    A block of b features is carried by g·b rows; in ascending order, the first b of them are the first head's.
    Raises LayoutError where a feature is carried by no row or by uneven numbers of them.
    """
    groups, size = fibres.shape
    heads = max(len(carriers) // (groups * size), 1)
    by_index = carriers.argsort()
    by_label = by_index[carried[by_index].argsort(stable=True)]
    ranked = carried[by_label].contiguous()
    first = torch.searchsorted(ranked, fibres.contiguous())  # (G, d)
    carrying = torch.searchsorted(ranked, fibres.contiguous(), right=True) - first
    places, order = fibres.sort(dim=1, stable=True)
    begin = torch.searchsorted(places, places)
    sizes = torch.empty_like(order).scatter_(1, order, torch.searchsorted(places, places, right=True) - begin)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(size).expand_as(order) - begin)  # within its block
    if not torch.equal(carrying, heads * sizes):
        raise LayoutError("a feature is not carried by the same number of rows as the others")
    head = torch.arange(heads).view(1, heads, 1)
    return carriers[by_label][first[:, None] + head * sizes[:, None] + rank[:, None]]


def build_layout(anchor: Tensor, classes: Classes, carriers: Mapping[str, tuple[Tensor, Tensor]]) -> Layout:
    """Layout of a site.

    anchor: (heads, d) labels where the features are consumed, one row a head.
    carriers: role → (labels, indices): the label of each row (or column) of the role, and its index in the parameter.
    """
    fibres = unique_fibres(classes.of(anchor))
    if (fibres < 0).any():
        raise LayoutError("some of the features that are consumed come from elsewhere")
    members = {}
    for role, (labels, indices) in carriers.items():
        carried = classes.of(labels)
        chosen = torch.isin(carried, fibres)
        members[role] = members_of(fibres, carried[chosen], indices[chosen])
    return Layout(fibres, kinds_of(fibres), members)


def rows_to_ranges(rows: Tensor) -> tuple[tuple[int, int], ...]:
    """Ascending indices as half-open ranges."""
    breaks = (rows.diff() != 1).nonzero().reshape(-1) + 1
    return tuple((int(part[0]), int(part[-1]) + 1) for part in rows.tensor_split(breaks.tolist()) if len(part))
