"""Writes to places that only a run tells: positions in a cache, sequences of a batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from modegpt_graph.flow.elements import OTHER, shape_of, varying_axes
from modegpt_graph.trace.operations import arguments, operation

WRITES_TO_PLACES = frozenset({"index_put", "index_copy"})


def writes_alike(node: fx.Node, labels: Mapping[fx.Node, Any]) -> bool:
    """Whether a write brings the same features to each of its places."""
    target, where, value, *rest = arguments(node)
    if node.kwargs:
        return False
    if operation(node) == "index_copy":
        value, axis = rest[0], where % len(shape_of(target))
        return axis not in varying_axes(_labels_of(value, labels, shape_of(value)))
    places = [axis for axis, index in enumerate(where) if index is not None]
    if any(rest) or any(where[axis].meta["val"].dtype in (torch.bool, torch.uint8) for axis in places):
        return False  # added to what is there, or only where a mask says so
    given = [None if index is None else torch.zeros(shape_of(index), dtype=torch.long) for index in where]
    written = torch.ops.aten.index.Tensor(torch.zeros(shape_of(target), dtype=torch.bool), given)
    is_adjacent = places == list(range(places[0], places[-1] + 1))
    first, count = places[0] if is_adjacent else 0, max(index.ndim for index in given if index is not None)
    varying = varying_axes(_labels_of(value, labels, tuple(written.shape)))
    return not set(varying) & set(range(first, first + count))


def _labels_of(value: fx.Node, labels: Mapping[fx.Node, Any], shape: tuple[int, ...]) -> Tensor:
    """Labels of a value, broadcast to a shape; none where it has none."""
    found = labels.get(value)
    return torch.broadcast_to(found if isinstance(found, Tensor) else torch.tensor(OTHER), shape)
