"""Follow features through a graph: every element of every tensor gets the label of the feature that it carries.

Producers (matrix products) start one label per output row. Data movement is run on the labels themselves; element-wise
operations join the labels that meet; contractions and reductions join what they sum over. What comes out is, per
operation, what it does to the features, and, over all, which features are coupled. -1 marks elements without a feature,
-2 those among them that are zero: padding may stand in a feature's place at some positions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from modegpt_graph.flow.classes import Classes
from modegpt_graph.flow.elements import (
    OTHER,
    PADDING,
    constant_of,
    hint,
    is_zero,
    of_one_position,
    shape_of,
    varying_axes,
)
from modegpt_graph.flow.written import WRITES_TO_PLACES, writes_alike
from modegpt_graph.trace.operations import Effect, arguments, data_operands, effect, operation

Labels = Tensor | tuple[Tensor, ...]


@dataclass
class Flow:
    """What following the features found.

    labels: node → labels of its value (a tuple of them where it has several).
    nonlinear: nodes that do not commute with a mixing of features, with what they do.
    scaled: those of them that multiply each feature by a number of its own, with the axes along which these differ.
    unknown: nodes whose operation is not in the table.
    approximates: whether sums over features (of a norm) are taken as a number of each token's own, which couples
    nothing: what is dropped then changes it, and that is an approximation.   approximated: the nodes where it was.
    """

    classes: Classes
    labels: dict[fx.Node, Labels] = field(default_factory=dict)
    nonlinear: dict[fx.Node, str] = field(default_factory=dict)
    scaled: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    unknown: list[fx.Node] = field(default_factory=list)
    approximates: bool = False
    approximated: list[fx.Node] = field(default_factory=list)


def run_on_labels(node: fx.Node, labels: Mapping[fx.Node, Labels], args: Any = None, kwargs: Any = None) -> Any:
    """Run a data movement on labels. Operands without labels become -1 everywhere; symbolic sizes their examples."""

    def fill(value: object) -> object:
        if isinstance(value, fx.Node):
            if value in labels:
                return labels[value]
            example = value.meta["val"]
            constant = constant_of(value)
            if constant is not None and not constant.is_floating_point():  # positions, not features
                return constant
            if isinstance(example, Tensor):
                return torch.full(shape_of(value), PADDING if is_zero(value) else OTHER)
            return hint(example)
        return hint(value)

    args, kwargs = (node.args if args is None else args), (node.kwargs if kwargs is None else kwargs)
    filled = pytree.tree_map(fill, (tuple(args), dict(kwargs)), is_leaf=lambda v: isinstance(v, fx.Node))
    # Labels are laid out in memory as they come; a view that the traced strides allow is a reshape here.
    target: Any = torch.ops.aten.reshape.default if operation(node) in ("view", "_unsafe_view") else node.target
    result = target(*filled[0], **filled[1])
    return tuple(result) if isinstance(result, (list, tuple)) else result


def follow(
    region: Sequence[fx.Node], starts: Mapping[fx.Node, Tensor], count: int, *, approximates: bool = False
) -> Flow:
    """Follow labels from `starts` (node → labels of its value) through `region` (nodes in topological order).

    count: number of labels in use.   approximates: see Flow.
    """
    flow = Flow(Classes(count), dict(starts), approximates=approximates)
    for node in region:
        if node not in flow.labels:
            _step(node, flow)
    return flow


def _labelled(node: fx.Node, flow: Flow) -> list[fx.Node]:
    return [operand for operand in dict.fromkeys(data_operands(node)) if operand in flow.labels]


def _step(node: fx.Node, flow: Flow) -> None:
    operands = _labelled(node, flow)
    if not operands or effect(node) is Effect.SIZE:
        return
    rule = _RULES.get(effect(node), _unknown)
    result: Labels | None = rule(node, operands, flow)
    parts = result if isinstance(result, tuple) else () if result is None else (result,)
    if result is not None and any((part >= 0).any() for part in parts):
        flow.labels[node] = result


def run_move(node: fx.Node, labels: Mapping[fx.Node, Labels], args: Any = None, kwargs: Any = None) -> Any:
    """Run a data movement on labels; what it pads with is marked as padding."""
    args, kwargs = (node.args if args is None else args), (node.kwargs if kwargs is None else kwargs)
    if operation(node) == "constant_pad_nd":
        filling = PADDING if [*args, 0][2] == 0 else OTHER
        return run_on_labels(node, labels, (*args[:2], filling), {})
    if operation(node) == "pad" and (len(args) < 3 or args[2] == "constant"):
        filling = PADDING if [*args, None, None][3] in (None, 0) else OTHER
        return run_on_labels(node, labels, (*args[:2], "constant", filling), {})
    if operation(node) in ("cat", "concat"):  # what has no elements has no features, however many axes it has
        args = ([part for part in args[0] if 0 not in shape_of(part)] or args[0], *args[1:])
    if operation(node) == "index_copy" and constant_of(args[2]) is None:  # one place stands for all
        return run_on_labels(node, labels, (*args[:2], torch.zeros(shape_of(args[2]), dtype=torch.long), args[3]))
    return run_on_labels(node, labels, args, kwargs)


def _move(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels | None:
    if operation(node) in WRITES_TO_PLACES and not writes_alike(node, flow.labels):
        return _unknown(node, operands, flow)
    return run_move(node, flow.labels)


def _same(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels:
    return flow.labels[operands[0]]


def _unary(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels:
    flow.nonlinear[node] = operation(node)
    return _filled(flow.labels[operands[0]])


def _filled(labels: Labels) -> Labels:
    """Labels of what is zero no longer where it was padding."""
    return labels.masked_fill(labels == PADDING, OTHER) if isinstance(labels, Tensor) else labels


def _elementwise(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels:
    """Sums and products: operands with features meet; one without scales or shifts each feature, or all alike."""
    name = operation(node)
    shape = shape_of(node)
    carried = [flow.labels[operand] for operand in operands]
    meeting = [torch.broadcast_to(labels, shape) for labels in carried if isinstance(labels, Tensor)]
    result = meeting[0].clone()
    for other in meeting[1:]:
        flow.classes.join(result, other)
        result = torch.where(result >= 0, result, other)
    if effect(node) is Effect.SUM and len(dict.fromkeys(node.all_input_nodes)) > len(operands):
        result = result.masked_fill(result == PADDING, OTHER)
    same = all(torch.equal(meeting[0], other) for other in meeting[1:])
    if len(operands) > 1 or _uses(node, operands[0]) > 1:
        if not (same and effect(node) is Effect.SUM):
            flow.nonlinear[node] = name
    elif effect(node) is Effect.SUM:
        if name.removesuffix("_") != "add" or not _is_zero(node):
            flow.nonlinear[node] = name
    elif name.removesuffix("_") in ("mul", "div") and _scales(node, operands[0]):
        side = next((n for n in node.all_input_nodes if n is not operands[0]), None)
        axes = () if side is None else _axes_that_differ(side, result)
        if axes:
            flow.nonlinear[node] = name
            flow.scaled[node] = axes
    else:
        flow.nonlinear[node] = name
    return result


def _uses(node: fx.Node, operand: fx.Node) -> int:
    return sum(1 for arg in pytree.tree_leaves((node.args, node.kwargs), is_leaf=_is_node) if arg is operand)


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


def _is_zero(node: fx.Node) -> bool:
    return any(isinstance(arg, (int, float)) and arg == 0 for arg in node.args)


def _scales(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a product multiplies its operand (x * a, a * x, x / a) rather than divides by it."""
    return operation(node).startswith("mul") or arguments(node)[0] is operand


def _axes_that_differ(side: fx.Node, labels: Tensor) -> tuple[int, ...]:
    """Axes of features along which an operand without features may differ, told by its shape."""
    shape = shape_of(side)
    aligned = (1,) * (labels.ndim - len(shape)) + shape
    return tuple(axis for axis in varying_axes(labels) if aligned[axis] > 1)


def reduced_axes(node: fx.Node, ndim: int) -> tuple[int, ...]:
    """Axes that a reduction sums over."""
    name = operation(node)
    if "layer_norm" in name or name == "rms_norm":
        normalized = arguments(node)[1]
        return tuple(range(ndim - len(normalized), ndim))
    if name == "group_norm":
        return tuple(range(1, ndim))
    axes: Any = arguments(node)[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if name == "linalg_vector_norm":
        axes = arguments(node)[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if axes is None or isinstance(axes, bool):
        return tuple(range(ndim))
    axes = [axes] if isinstance(axes, int) else list(axes)
    return tuple(axis % ndim for axis in axes) or tuple(range(ndim))


def _join_along(labels: Tensor, axis: int, classes: Classes) -> None:
    if labels.shape[axis] > 1:
        classes.join(labels.narrow(axis, 0, labels.shape[axis] - 1), labels.narrow(axis, 1, labels.shape[axis] - 1))


def _reduce(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels | None:
    labels = flow.labels[operands[0]]
    assert isinstance(labels, Tensor)
    flow.nonlinear[node] = operation(node)
    axes = reduced_axes(node, labels.ndim)
    value = node.meta["val"]
    if flow.approximates and axes == (labels.ndim - 1,) and shape_of(node) != tuple(labels.shape):
        flow.approximated.append(node)
        return None
    for axis in axes:
        _join_along(labels, axis, flow.classes)
    if not isinstance(value, Tensor):
        flow.unknown.append(node)
        return None
    shape = shape_of(node)
    if shape == tuple(labels.shape):
        return labels
    kept = labels
    for axis in axes:
        kept = kept.narrow(axis, 0, 1)
    return kept.reshape(shape)


def _fresh(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> None:
    return None


def _complex(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels:
    """(..., n, 2) → (..., n): the two parts of a complex number are one class, and carry its first label."""
    labels = flow.labels[operands[0]]
    assert isinstance(labels, Tensor)
    flow.classes.join(labels[..., 0], labels[..., 1])
    flow.nonlinear[node] = operation(node)
    return labels[..., 0]


def _real(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels:
    labels = flow.labels[operands[0]]
    assert isinstance(labels, Tensor)
    return torch.stack([labels, labels], dim=-1)


def _product_sum(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels | None:
    """A · B: features that are summed over meet their partners; features on free axes pass on."""
    left, right = (
        (arguments(node)[1], arguments(node)[2]) if operation(node) in ("addmm", "baddbmm") else arguments(node)[:2]
    )
    left_labels, right_labels = _as_rows(flow.labels.get(left)), _as_columns(flow.labels.get(right))
    shape = shape_of(node)
    if left_labels is not None and right_labels is not None:
        return _contract(node, left_labels, right_labels, flow)
    if right_labels is not None:
        if right_labels.shape[-2] > 1 and right_labels.ndim - 2 in varying_axes(right_labels):
            return _mixed(node, right_labels, shape, flow)
        return _summed(node, right_labels, -2, shape, flow)
    assert left_labels is not None
    if left_labels.shape[-1] > 1 and left_labels.ndim - 1 in varying_axes(left_labels):
        mixed = _mixed(node, left_labels.mT, (*shape[:-2], shape[-1], shape[-2]), flow)
        return None if mixed is None else mixed.mT
    return _summed(node, left_labels, -1, shape, flow)


def _as_rows(labels: Labels | None) -> Tensor | None:
    """Labels of a left operand; a vector is one row."""
    return None if not isinstance(labels, Tensor) else labels[None] if labels.ndim == 1 else labels


def _as_columns(labels: Labels | None) -> Tensor | None:
    return None if not isinstance(labels, Tensor) else labels[:, None] if labels.ndim == 1 else labels


def _summed(node: fx.Node, labels: Tensor, axis: int, shape: Sequence[int], flow: Flow) -> Tensor | None:
    """A product that sums over an axis which is no feature's: the features pass on."""
    one = of_one_position(labels if axis == -2 else labels.mT)
    if one is None:
        flow.unknown.append(node)
        return None
    return (one if axis == -2 else one.mT).expand(*shape).clone()


def _mixed(node: fx.Node, labels: Tensor, shape: Sequence[int], flow: Flow) -> Tensor | None:
    """Numbers times features: those along the axis that is summed over become one class.

    labels: (…, m, n).   Returns (…, m, n), the i-th one with the label of the i-th; None where fewer or more come out.
    """
    flow.nonlinear[node] = operation(node)
    _join_along(labels, labels.ndim - 2, flow.classes)
    return labels.expand(*shape).clone() if shape[-2] == labels.shape[-2] else None


def _contract(node: fx.Node, left: Tensor, right: Tensor, flow: Flow) -> None:
    """The product of two features: classes of partners are joined, and no feature passes on."""
    first, second = of_one_position(left), of_one_position(right.mT)
    if first is None or second is None or not (varying_axes(first) or varying_axes(second)):
        flow.unknown.append(node)
        flow.nonlinear[node] = operation(node)
        return
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    flow.classes.join(*(one.squeeze(-2).expand(*batch, one.shape[-1]) for one in (first, second)))


def _attention(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels | None:
    query, key, value = (flow.labels.get(operand) for operand in arguments(node)[:3])
    if isinstance(query, Tensor) and isinstance(key, Tensor):
        partners = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        flow.classes.join(query.amax(2), partners.amax(2))
    for one, other in ((query, key), (key, query)):
        if isinstance(one, Tensor) and not isinstance(other, Tensor):  # they meet what does not change with them
            flow.nonlinear[node] = operation(node)
            _join_along(one, one.ndim - 1, flow.classes)
    if not isinstance(value, Tensor):
        return None
    shape = shape_of(node)
    heads_axis = 2 if operation(node) == "attention" else 1
    shared = of_one_position(value)  # (B, G, 1, e)
    if shared is None:
        flow.unknown.append(node)
        return None
    heads = shared.repeat_interleave(shape[heads_axis] // shared.shape[1], dim=1)
    return (heads.transpose(1, 2) if heads_axis == 2 else heads).expand(shape).clone()


def _cache(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels:
    result = []
    for operand, example in zip(arguments(node)[:2], node.meta["val"], strict=True):
        labels = flow.labels.get(operand)
        shape = tuple(int(hint(size)) for size in example.shape)
        if isinstance(labels, Tensor):
            result.append(labels.amax(-2, keepdim=True).expand(shape).clone())
        else:
            result.append(torch.full(shape, -1))
    return tuple(result)


def _unknown(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels | None:
    """Not in the table: nothing is known, so every feature may meet every other."""
    flow.unknown.append(node)
    flow.nonlinear[node] = operation(node)
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        for operand in operands:
            labels = flow.labels[operand]
            if isinstance(labels, Tensor) and shape_of(node) == tuple(labels.shape):
                return labels
    return None


_RULES: dict[Effect, Callable[[fx.Node, Sequence[fx.Node], Flow], Any]] = {
    Effect.MOVE: _move,
    Effect.SAME: _same,
    Effect.LINEAR_UNARY: _same,
    Effect.UNARY: _unary,
    Effect.SUM: _elementwise,
    Effect.PRODUCT: _elementwise,
    Effect.REDUCE: _reduce,
    Effect.PRODUCT_SUM: _product_sum,
    Effect.ATTENTION: _attention,
    Effect.FRESH: _fresh,
    Effect.COMPLEX: _complex,
    Effect.REAL: _real,
    Effect.CACHE: _cache,
}


def reachable(starts: Iterable[fx.Node], stop: Callable[[fx.Node], bool], forward: bool) -> set[fx.Node]:
    """Nodes reached from `starts` along (or against) the edges, going no further than nodes where `stop` holds."""
    seen: set[fx.Node] = set()
    queue = list(starts)
    while queue:
        node = queue.pop()
        for other in node.users if forward else node.all_input_nodes:
            if other not in seen:
                seen.add(other)
                if not stop(other):
                    queue.append(other)
    return seen
