"""A new tensor that is filled piece by piece along one axis is those pieces side by side, and is said so."""

import torch
from torch import fx

from modegpt_graph.trace.operations import Effect, arguments, effect, operation


def join_filled(graph: fx.Graph) -> None:
    """Replace every chain of writes that fills a new tensor by one `cat` of what was written. The graph is changed.

    Left as they are: chains that leave a part of the tensor unwritten, write a part twice, or change what they write.
    """
    for node in list(graph.nodes):
        if operation(node) != "slice_scatter" or any(operation(user) == "slice_scatter" for user in node.users):
            continue
        found = _pieces(node)
        if found is None:
            continue
        pieces, axis = found
        with graph.inserting_before(node):
            joined = graph.call_function(torch.ops.aten.cat.default, (pieces, axis))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
        _erase(graph, node)


def _pieces(last: fx.Node) -> tuple[list[fx.Node], int] | None:
    """What was written, in order along the axis, and the axis; None where the chain is no filling."""
    written: dict[int, tuple[int, fx.Node]] = {}
    axes: set[int] = set()
    node = last
    while operation(node) == "slice_scatter":
        target, piece, axis, start, stop, step = [*arguments(node), *(0, None, None, 1)[len(node.args) - 2 :]]
        shape = node.meta["val"].shape
        size = shape[axis]
        if step != 1 or not isinstance(size, int):
            return None
        piece = _written(piece)
        value, start, stop = piece.meta["val"], start or 0, size if stop is None else min(stop, size)
        whole = all(
            a == b for dim, (a, b) in enumerate(zip(value.shape, shape, strict=True)) if dim != axis % len(shape)
        )
        if value.dtype != node.meta["val"].dtype or not whole or value.shape[axis] != stop - start:
            return None
        written[start] = stop, piece
        axes.add(axis % len(shape))
        node = target
    if effect(node) is not Effect.FRESH or len(axes) != 1:
        return None
    pieces, reached = [], 0
    while reached in written:
        reached, piece = written.pop(reached)
        pieces.append(piece)
    axis = axes.pop()
    return (pieces, axis) if not written and reached == last.meta["val"].shape[axis] else None


def _written(piece: fx.Node) -> fx.Node:
    """The value that a copy into a slice brings."""
    if operation(piece) == "copy":
        source = arguments(piece)[1]
        if isinstance(source, fx.Node) and source.meta["val"].shape == piece.meta["val"].shape:
            return source
    return piece


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads, and what only it read."""
    queue, erased = [node], set()
    while queue:
        one = queue.pop()
        if one not in erased and not one.users and one.op == "call_function":
            operands = one.all_input_nodes
            graph.erase_node(one)
            erased.add(one)
            queue += operands
