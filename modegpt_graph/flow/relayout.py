"""Data movement said again from its source, where the tensors in between would be irregular.

A fused projection whose rows are viewed as (head, 3, d) has no such view once its three parts differ in size. Its parts
are regular all the same: each is a choice of the source's features, then a view, then an order of axes. The rows of the
smaller matrix may stand in any order, so nothing is lost.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from modegpt_graph.errors import ModegptError
from modegpt_graph.flow.elements import shape_of
from modegpt_graph.flow.labels import run_on_labels
from modegpt_graph.trace.operations import Effect, effect


class RelayoutError(ModegptError):
    """A tensor that is no choice, view and order of its source's features."""


@dataclass(frozen=True)
class Relayout:
    """`source.index_select(-1, index).reshape(sizes).permute(order)`; an order of None leaves the axes as they are."""

    source: fx.Node
    index: Tensor
    sizes: tuple[Any, ...]
    order: tuple[int, ...] | None


def view_permute(tensor: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """`tensor.reshape(sizes).permute(order)`."""
    return tensor.reshape(list(sizes)).permute(list(order))


view_permute._opname = "view_permute"  # type: ignore[attr-defined]


def relayout(node: fx.Node, starts: frozenset[fx.Node], kept: Tensor) -> Relayout:
    """How a data movement is said again from the product with a matrix that it comes from.

    starts: products with matrices.   kept: (F,) which of the source's features stay.
    Raises RelayoutError where the value of `node` has no such form.
    """
    chain = _chain(node, starts)
    source = chain[0]
    *lead, features = shape_of(source)
    count = 1
    for size in lead:
        count *= size
    places = _replay(chain, torch.arange(features).expand(*lead, features).contiguous())
    rows = _replay(chain, torch.arange(count).reshape(*lead, 1).expand(*lead, features).contiguous())
    if (places < 0).any():
        raise RelayoutError("padding stands among the features")
    axes = _lead_axes(rows, lead)
    order = [*axes, *(axis for axis in range(places.ndim) if axis not in axes)]
    ordered = places.permute(order)
    first = ordered.reshape(count, *ordered.shape[len(lead) :])[0]
    if not (ordered.reshape(count, *first.shape) == first).all():
        raise RelayoutError("features and positions share an axis")
    chosen = _keep(first, kept)
    ranks = kept.cumsum(0) - 1
    symbolic = list(source.meta["val"].shape[:-1])
    inverse = tuple(torch.tensor(order).argsort().tolist())
    plain = inverse == tuple(range(len(inverse)))
    return Relayout(source, ranks[chosen.reshape(-1)], (*symbolic, *chosen.shape), None if plain else inverse)


def _chain(node: fx.Node, starts: frozenset[fx.Node]) -> list[fx.Node]:
    """From the product to `node`, each operation the only source of the next."""
    chain = [node]
    while chain[-1] not in starts:
        inputs = [operand for operand in chain[-1].all_input_nodes if source_of(operand, starts) is not None]
        if effect(chain[-1]) not in (Effect.MOVE, Effect.SAME) or len(inputs) != 1:
            raise RelayoutError("more than data movement stands before it")
        chain.append(inputs[0])
    return chain[::-1]


def source_of(node: fx.Node, starts: Collection[fx.Node]) -> fx.Node | None:
    """The product with a matrix that a chain of data movement begins at, None where there is none."""
    queue, seen = [node], set()
    while queue:
        one = queue.pop()
        if one in starts:
            return one
        if one not in seen and effect(one) in (Effect.MOVE, Effect.SAME):
            seen.add(one)
            queue += one.all_input_nodes
    return None


def _replay(chain: Sequence[fx.Node], value: Tensor) -> Tensor:
    known: dict[fx.Node, Any] = {chain[0]: value}
    for before, node in pairwise(chain):
        known[node] = known[before] if effect(node) is Effect.SAME else run_on_labels(node, known)
    result = known[chain[-1]]
    if not isinstance(result, Tensor):
        raise RelayoutError("it is several tensors")
    return result


def _lead_axes(rows: Tensor, lead: Sequence[int]) -> list[int]:
    """The axis of the moved tensor that stands for each leading axis of its source."""
    axes: list[int] = []
    coordinates = torch.unravel_index(rows, tuple(lead))
    varying = [
        {a for a in range(rows.ndim) if rows.shape[a] > 1 and (c.narrow(a, 0, 1) != c).any()} for c in coordinates
    ]
    for index, own in enumerate(varying):
        if len(own) > 1 or (lead[index] > 1 and not own):
            raise RelayoutError("positions are spread over axes")
        if own:
            axes.append(own.pop())
            continue
        taken = {*axes, *(axis for other in varying for axis in other)}
        free = [axis for axis in range(rows.ndim) if rows.shape[axis] == 1 and axis not in taken]
        if not free:
            raise RelayoutError("an axis of positions is missing")
        axes.append(free[0])
    return axes


def _keep(places: Tensor, kept: Tensor) -> Tensor:
    """The places that stay, in the same order, as a regular tensor."""
    mask = kept[places]
    if mask.all():
        return places
    for axis in reversed(range(places.ndim)):
        counts = mask.sum(axis)
        size = int(counts.reshape(-1)[0])
        if (counts == size).all():
            last = places.movedim(axis, -1)[mask.movedim(axis, -1)]
            shape = [length for other, length in enumerate(places.shape) if other != axis]
            return last.reshape(*shape, size).movedim(-1, axis)
    raise RelayoutError("the kept features do not form a regular tensor")
