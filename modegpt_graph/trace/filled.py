"""A new tensor that is filled piece by piece along one axis is those pieces side by side, and is said so."""

import torch
from torch import fx

from modegpt_graph.trace.operations import Effect, arguments, effect, operation
from modegpt_graph.trace.spelling import call_like


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
        pieces, axis, step = found
        dtype = node.meta["val"].dtype
        with graph.inserting_before(node):
            pieces = [
                piece
                if piece.meta["val"].dtype == dtype
                else call_like(graph, node, torch.ops.aten.to.dtype, piece, dtype)
                for piece in pieces
            ]
            if step == 1:
                joined = call_like(graph, node, torch.ops.aten.cat.default, pieces, axis)
            else:
                side_by_side = call_like(graph, node, torch.ops.aten.stack.default, pieces, axis + 1)
                joined = call_like(graph, node, torch.ops.aten.flatten.using_ints, side_by_side, axis, axis + 1)
        node.replace_all_uses_with(joined)
        erase_unread(graph, node)


def _pieces(last: fx.Node) -> tuple[list[fx.Node], int, int] | None:
    """What was written, in order along the axis, the axis, and the step; None where the chain is no filling.

    With a step of 1 the pieces stand one after another; with a step of n each has every n-th place.
    """
    written: dict[int, tuple[int, fx.Node]] = {}
    axes: set[int] = set()
    steps: set[int] = set()
    node = last
    while operation(node) == "slice_scatter":
        target, piece, axis, start, stop, step = [*arguments(node), *(0, None, None, 1)[len(node.args) - 2 :]]
        shape = node.meta["val"].shape
        size = shape[axis]
        if not all(isinstance(one, int) for one in (size, start or 0, stop or 0, step)):
            return None
        value, start, stop = piece.meta["val"], start or 0, size if stop is None else min(stop, size)
        whole = all(
            a == b for dim, (a, b) in enumerate(zip(value.shape, shape, strict=True)) if dim != axis % len(shape)
        )
        if not whole or value.shape[axis] != len(range(start, stop, step)):
            return None
        written[start] = stop, piece
        axes.add(axis % len(shape))
        steps.add(step)
        node = target
    if effect(node) is not Effect.FRESH or len(axes) != 1 or len(steps) != 1:
        return None
    (axis,), (step,) = axes, steps
    size = last.meta["val"].shape[axis]
    if step > 1:
        every = sorted(written) == list(range(step)) and size % step == 0
        every = every and all(piece.meta["val"].shape[axis] == size // step for _, piece in written.values())
        return ([written[start][1] for start in range(step)], axis, step) if every else None
    pieces, reached = [], 0
    while reached in written:
        reached, piece = written.pop(reached)
        pieces.append(piece)
    return (pieces, axis, 1) if not written and reached == size else None


def erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads, and what only it read."""
    queue, erased = [node], set()
    while queue:
        one = queue.pop()
        if one not in erased and not one.users and one.op == "call_function":
            operands = one.all_input_nodes
            graph.erase_node(one)
            erased.add(one)
            queue += operands
