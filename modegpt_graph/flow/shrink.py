"""Rewrite the nodes of a graph for features that were dropped or reordered.

Every tensor of the region has labels, so what its smaller version must hold is known. Data movement gets new sizes, and
the edit is accepted only where running it on the labels gives just that; operands that carry no feature but have the
feature axis (cos and sin tables, scales) are gathered at the positions that the kept features came from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from modegpt_graph.errors import ModegptError
from modegpt_graph.flow.elements import OTHER, PADDING, hint, is_zero, shape_of
from modegpt_graph.flow.labels import Flow, Labels, run_move
from modegpt_graph.flow.relayout import RelayoutError, relayout, source_of, view_permute
from modegpt_graph.trace.operations import Effect, arguments, data_operands, effect, operation


class ShrinkError(ModegptError):
    """A node that cannot be rewritten for fewer features."""


@dataclass(frozen=True)
class Selection:
    """Which label stands where after the rewrite.

    keep: (labels,) whether the place of a label stays.   source: (labels,) the label that is in that place afterwards.
    """

    keep: Tensor
    source: Tensor

    @classmethod
    def everything(cls, count: int) -> "Selection":
        return cls(torch.ones(count, dtype=torch.bool), torch.arange(count))

    @classmethod
    def merged(cls, parts: Iterable["Selection"], count: int) -> "Selection":
        """All of what selections of different labels do."""
        whole = cls.everything(count)
        for part in parts:
            source = torch.where(part.source != torch.arange(count), part.source, whole.source)
            whole = cls(whole.keep & part.keep, source)
        return whole


@dataclass(frozen=True)
class Gather:
    """Take elements of an operand: `take_along_dim(operand, index, axis)`.

    axis: negative, from the end.   index: one axis where all heads agree, else broadcastable to the operand.
    """

    axis: int
    index: Tensor


@dataclass
class Edits:
    """What changes in a graph.

    labels: node → labels of its smaller value.   arguments: node → (target, positional, keyword) arguments.
    gathers: (node, operand) → how the operand is gathered first.   factors: node → what its value is multiplied by.
    bypassed: nodes that would be irregular; what reads
    them is said again from the product with a matrix that they come from.
    """

    labels: dict[fx.Node, Labels] = field(default_factory=dict)
    arguments: dict[fx.Node, tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    gathers: dict[tuple[fx.Node, fx.Node], Gather] = field(default_factory=dict)
    factors: dict[fx.Node, Tensor] = field(default_factory=dict)
    bypassed: set[fx.Node] = field(default_factory=set)

    @property
    def empty(self) -> bool:
        return not self.arguments and not self.gathers and not self.bypassed and not self.factors


def select(labels: Tensor, selection: Selection) -> tuple[Tensor, int | None]:
    """(labels of the smaller tensor, the axis that shrank). Raises ShrinkError where heads would differ in size."""
    behind = _behind_padding(labels)
    mask = torch.where(behind >= 0, selection.keep[behind.clamp(min=0)], True)
    moved = torch.where(labels >= 0, selection.source[labels.clamp(min=0)], labels)
    if mask.all():
        return moved, None
    for axis in reversed(range(labels.ndim)):
        counts = mask.sum(axis)
        count = int(counts.reshape(-1)[0])
        if (counts == count).all():
            last = moved.movedim(axis, -1)[mask.movedim(axis, -1)]
            shape = [size for i, size in enumerate(labels.shape) if i != axis]
            return last.reshape(*shape, count).movedim(-1, axis), axis
    raise ShrinkError("the kept features do not form a regular tensor")


def _behind_padding(labels: Tensor) -> Tensor:
    """Labels with those of other positions where there is padding."""
    if (labels == PADDING).any():
        for axis in range(labels.ndim):
            one = labels.amax(axis, keepdim=True)
            if (one != PADDING).all() and ((labels == one) | (labels == PADDING)).all():
                return one.expand_as(labels)
    return labels


def origins(labels: Tensor, smaller: Tensor, axis: int) -> Tensor:
    """Where along `axis` each element of the smaller tensor came from; axes along which this is equal have size 1.

    Where one label stands several times, its first place in the smaller tensor came from its first place, and so on.
    """
    old, new = labels.movedim(axis, -1), smaller.movedim(axis, -1)
    order = old.argsort(dim=-1, stable=True)
    ranked = old.gather(-1, order).contiguous()
    found = torch.searchsorted(ranked, new.contiguous()) + _occurrences(new)
    index = order.gather(-1, found.clamp(max=old.shape[-1] - 1)).movedim(-1, axis)
    for other in range(index.ndim):
        if other != axis and (index == index.narrow(other, 0, 1)).all():
            index = index.narrow(other, 0, 1)
    return index


def _occurrences(labels: Tensor) -> Tensor:
    """How many equal labels stand before each one along the last axis."""
    ranked, order = labels.sort(dim=-1, stable=True)
    first = torch.searchsorted(ranked.contiguous(), ranked.contiguous())
    return torch.empty_like(order).scatter_(-1, order, torch.arange(labels.shape[-1]).expand_as(order) - first)


def shrink(region: Sequence[fx.Node], flow: Flow, selection: Selection) -> Edits:
    """Edits that make every node of `region` (in topological order) right for `selection`.

    Raises ShrinkError, naming the node, where that is impossible.
    """
    edits = Edits()
    for node, labels in flow.labels.items():
        if node not in region:
            edits.labels[node] = _select_all(node, labels, selection)
    starts = _kept_features(region, flow, selection)
    for node in region:
        if any(operand in edits.bypassed for operand in data_operands(node)):
            _bypass(node, flow, edits, selection, starts)
        elif node in flow.labels:
            try:
                edits.labels[node] = _select_all(node, flow.labels[node], selection)
            except ShrinkError:
                if effect(node) not in (Effect.MOVE, Effect.SAME):
                    raise
                edits.bypassed.add(node)
                continue
            try:
                _edit(node, flow, edits, selection)
            except ShrinkError:
                if effect(node) is not Effect.MOVE or not isinstance(flow.labels[node], Tensor):
                    raise
                _bypass(node, flow, edits, selection, starts)
                if node in edits.bypassed:
                    raise
        elif effect(node) is Effect.FRESH and operation(node).endswith("_like"):
            like = edits.labels.get(arguments(node)[0])
            if isinstance(like, Tensor):
                edits.labels[node] = torch.full_like(like, PADDING if is_zero(node) else OTHER)
        elif effect(node) is Effect.ATTENTION:
            _keep_scale(node, flow, edits)
    for node in flow.labels:  # where queries and keys meet may be the end of a region, and no part of it
        for user in node.users:
            if user not in edits.arguments:
                _keep_scale(user, flow, edits)
    _bypass_outside(region, flow, edits, selection, starts)
    return edits


def _kept_features(region: Sequence[fx.Node], flow: Flow, selection: Selection) -> dict[fx.Node, Tensor]:
    """Per product with a matrix, (F,) which of its features stay."""
    kept = {}
    for node, labels in flow.labels.items():
        if node not in region and node.op == "call_function" and isinstance(labels, Tensor):
            line = labels.reshape(-1, labels.shape[-1])[0]
            kept[node] = torch.where(line >= 0, selection.keep[line.clamp(min=0)], True)
    return kept


def _bypass(node: fx.Node, flow: Flow, edits: Edits, selection: Selection, starts: Mapping[fx.Node, Tensor]) -> None:
    """Say a node that reads an irregular tensor again, or leave it to those that read it."""
    if effect(node) not in (Effect.MOVE, Effect.SAME):
        raise ShrinkError(f"`{node.name}` ({operation(node)}): the kept features do not form a regular tensor")
    source = source_of(node, starts)
    try:
        if source is None:
            raise RelayoutError("no product with a matrix stands before it")
        found = relayout(node, frozenset(starts), starts[source])
    except RelayoutError:
        edits.bypassed.add(node)
        return
    if node in flow.labels:
        edits.labels[node] = _select_all(node, flow.labels[node], selection)
        start = edits.labels[source]
        assert isinstance(start, Tensor)
        moved = start[..., found.index].reshape([int(hint(size)) for size in found.sizes])
        moved = moved if found.order is None else moved.permute(found.order)
        if not _equal(moved, edits.labels[node]):
            raise ShrinkError(f"`{node.name}` ({operation(node)}) cannot be rewritten for fewer features")
    if found.order is None:
        edits.arguments[node] = (torch.ops.aten.reshape.default, (source, list(found.sizes)), {})
    else:
        edits.arguments[node] = (view_permute, (source, list(found.sizes)), {"order": found.order})
    edits.gathers[node, source] = Gather(-1, found.index)


def _bypass_outside(
    region: Sequence[fx.Node], flow: Flow, edits: Edits, selection: Selection, starts: Mapping[fx.Node, Tensor]
) -> None:
    """Parts of a shrunk product that nodes outside of the region take keep their features."""
    inside = {node for node in region if node in flow.labels or node in edits.bypassed or node in edits.arguments}
    shrunk = {start for start, kept in starts.items() if not kept.all()}
    queue = [*shrunk, *(node for node in region if node in flow.labels and effect(node) in (Effect.MOVE, Effect.SAME))]
    queue += [node for node in edits.bypassed if node not in flow.labels]
    while queue:
        node = queue.pop()
        for user in node.users:
            if user in inside or user.op != "call_function" or effect(user) is Effect.SIZE:
                continue
            if node not in data_operands(user):
                continue
            if effect(user) not in (Effect.MOVE, Effect.SAME):
                if node in edits.bypassed:
                    raise ShrinkError(f"`{user.name}` ({operation(user)}) reads features that no longer form a tensor")
                continue
            if operation(user) == "getitem" and node not in edits.bypassed:
                continue
            if isinstance(user.meta.get("val"), Tensor) and 0 in shape_of(user):
                continue
            if source_of(user, starts) not in shrunk:
                continue
            _bypass(user, flow, edits, selection, starts)
            if user in edits.bypassed:
                queue.append(user)


def _select_all(node: fx.Node, labels: Labels, selection: Selection) -> Labels:
    try:
        if isinstance(labels, tuple):
            return tuple(select(part, selection)[0] for part in labels)
        return select(labels, selection)[0]
    except ShrinkError as error:
        raise ShrinkError(f"`{node.name}` ({operation(node)}): {error}") from None


def _edit(node: fx.Node, flow: Flow, edits: Edits, selection: Selection) -> None:
    kind = effect(node)
    if kind is Effect.MOVE:
        _edit_move(node, flow, edits, selection)
    elif kind in (Effect.SUM, Effect.PRODUCT, Effect.PRODUCT_SUM):
        _gather_sides(node, flow, edits, selection)
    elif kind is Effect.ATTENTION:
        _keep_scale(node, flow, edits)


def _edit_move(node: fx.Node, flow: Flow, edits: Edits, selection: Selection) -> None:
    expected = edits.labels[node]
    for target, args, kwargs in _candidates(node, flow, edits, selection):
        try:
            found = _run(node, target, edits.labels, args, kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError):
            continue
        if _equal(found, expected):
            if target is not node.target or args != node.args or kwargs != node.kwargs:
                edits.arguments[node] = (target, args, kwargs)
            return
    raise ShrinkError(f"`{node.name}` ({operation(node)}) cannot be rewritten for fewer features")


def _run(node: fx.Node, target: Any, labels: Mapping[fx.Node, Labels], args: Any, kwargs: Any) -> Any:
    if target is node.target:
        return run_move(node, labels, args, kwargs)
    filled = [labels[arg] if isinstance(arg, fx.Node) and arg in labels else hint(arg) for arg in args]
    result = target(*filled, **kwargs)
    return tuple(result) if isinstance(result, (list, tuple)) else result


def _equal(found: Any, expected: Labels) -> bool:
    if isinstance(expected, tuple):
        return isinstance(found, tuple) and len(found) == len(expected) and all(map(torch.equal, found, expected))
    return isinstance(found, Tensor) and torch.equal(found, expected)


def _candidates(node: fx.Node, flow: Flow, edits: Edits, selection: Selection) -> Iterator[tuple[Any, tuple, dict]]:
    """Ways to say a data movement again, the unchanged one first."""
    yield node.target, node.args, dict(node.kwargs)
    name, args = operation(node), arguments(node)
    kwargs: dict[str, Any] = dict(node.kwargs)
    expected = edits.labels[node]
    if isinstance(expected, Tensor) and len(args) > 1 and isinstance(args[1], (list, tuple)):
        old = shape_of(node)
        sizes = [
            new if isinstance(size, int) and size >= 0 and new != was else size
            for size, new, was in zip(args[1], expected.shape, old, strict=False)
        ]
        yield node.target, (args[0], sizes, *args[2:]), kwargs
        yield node.target, (args[0], list(map(int, expected.shape)), *args[2:]), kwargs
    source = flow.labels.get(args[0]) if isinstance(args[0], fx.Node) else None
    if not isinstance(source, Tensor):
        return
    if name == "unflatten" and isinstance(expected, Tensor):
        first: Any = args[1]
        along = first % source.ndim
        given = zip(args[2], expected.shape[along : along + len(args[2])], strict=True)
        sizes = [int(new) if isinstance(size, int) and size >= 0 else size for size, new in given]
        yield node.target, (args[0], args[1], sizes), kwargs
    if name == "slice" and len(args) >= 4:
        along: Any = args[1]
        start, stop = args[2] or 0, args[3]
        counts = _kept_before(source, along, selection)
        stop_mapped = stop if stop is None or stop >= source.shape[along] else counts(stop)
        yield node.target, (args[0], along, counts(start), stop_mapped, *args[4:]), kwargs
    if name in ("split", "split_with_sizes", "chunk", "tensor_split") and isinstance(expected, tuple):
        axis: int = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        sizes = [int(part.shape[axis]) for part in expected]
        yield torch.ops.aten.split_with_sizes.default, (args[0], sizes, axis), {}
    if name == "roll" and len(args) > 2:
        counts = _kept_before(source, args[2][0], selection)
        size = source.shape[args[2][0]]
        shift = args[1][0]
        yield node.target, (args[0], [counts(shift % size)], args[2]), kwargs


def _kept_before(labels: Tensor, axis: int, selection: Selection) -> Callable[[int], int]:
    """Function from a position along `axis` to the number of kept elements before it."""
    lines = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])[:1]
    kept = torch.where(lines >= 0, selection.keep[lines.clamp(min=0)], True)[0]

    def count(position: int) -> int:
        if position < 0:
            position += len(kept)
        return int(kept[:position].sum())

    return count


def _gather_sides(node: fx.Node, flow: Flow, edits: Edits, selection: Selection) -> None:
    labels, smaller = flow.labels[node], edits.labels[node]
    assert isinstance(labels, Tensor)
    assert isinstance(smaller, Tensor)
    _, shrunk = select(labels, selection)
    axes = [shrunk] if shrunk is not None else [a for a in range(labels.ndim) if labels.shape[a] > 1]
    if effect(node) is Effect.PRODUCT_SUM:  # its last two axes are not those of its operands
        axes = [axis for axis in axes if axis < labels.ndim - 2]
    for axis in axes:
        for side in node.all_input_nodes:
            if side in flow.labels or not isinstance(side.meta.get("val"), Tensor):
                continue
            _gather_side(node, side, axis, labels, smaller, edits)


def _gather_side(node: fx.Node, side: fx.Node, axis: int, labels: Tensor, smaller: Tensor, edits: Edits) -> None:
    shape = shape_of(side)
    offset = axis - labels.ndim  # negative, from the end
    if len(shape) < -offset or shape[offset] == 1:
        return
    same_set = torch.equal(labels.sort(dim=axis).values, smaller.sort(dim=axis).values)
    if labels.shape[axis] == smaller.shape[axis] and not same_set:
        return  # features moved between other axes; those axes are gathered on their own
    index = origins(labels, smaller, axis)
    if index.shape[axis] == labels.shape[axis] and torch.equal(
        index,
        torch.arange(index.shape[axis]).reshape([-1 if a == axis else 1 for a in range(index.ndim)]).expand_as(index),
    ):
        return
    if index.numel() == index.shape[axis]:
        index = index.reshape(-1)
    elif effect(node) is Effect.PRODUCT_SUM and index.shape[-2:].numel() > 1:
        raise ShrinkError(
            f"`{node.name}` ({operation(node)}) multiplies several heads by one `{operation(side)}`, and each would "
            "keep another part of it"
        )
    edits.gathers[node, side] = Gather(offset, index)


def _keep_scale(node: fx.Node, flow: Flow, edits: Edits) -> None:
    """Attention keeps the scale of the original head dimension."""
    if operation(node) != "scaled_dot_product_attention" or arguments(node)[0] not in flow.labels:
        return
    if node.kwargs.get("scale") is None:
        scale = float(shape_of(arguments(node)[0])[-1]) ** -0.5
        edits.arguments[node] = (node.target, node.args, {**node.kwargs, "scale": scale})
