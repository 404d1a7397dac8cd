"""Follow features through a graph: every element of every tensor gets the label of the feature that it carries.

Producers (matrix products) start one label per output row. Data movement is run on the labels themselves; element-wise
operations join the labels that meet; contractions and reductions join what they sum over. What comes out is, per
operation, what it does to the features, and, over all, which features are coupled. -1 marks elements without a feature.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

from modegpt_graph.flow.classes import Classes
from modegpt_graph.trace.operations import Effect, arguments, data_operands, effect, operation

ROUTED = 3  # an example of how many tokens go to an expert

Labels = Tensor | tuple[Tensor, ...]


@dataclass
class Flow:
    """What following the features found.

    labels: node → labels of its value (a tuple of them where it has several).
    nonlinear: nodes that do not commute with a mixing of features, with what they do.
    unknown: nodes whose operation is not in the table.
    approximates: whether sums over features (of a norm) are taken as a number of each token's own, which couples
    nothing: what is dropped then changes it, and that is an approximation.   approximated: the nodes where it was.
    """

    classes: Classes
    labels: dict[fx.Node, Labels] = field(default_factory=dict)
    nonlinear: dict[fx.Node, str] = field(default_factory=dict)
    unknown: list[fx.Node] = field(default_factory=list)
    approximates: bool = False
    approximated: list[fx.Node] = field(default_factory=list)


def hint(value: Any) -> Any:
    """The example size behind a symbolic size, ROUTED where it depends on data; other values as they are."""
    return optimization_hint(value, fallback=ROUTED) if isinstance(value, torch.SymInt) else value


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Example shape of a node's value."""
    return tuple(int(hint(size)) for size in node.meta["val"].shape)


def varying_axes(labels: Tensor) -> tuple[int, ...]:
    """Axes along which the labels are not all equal."""
    return tuple(a for a in range(labels.ndim) if labels.shape[a] > 1 and (labels.narrow(a, 0, 1) != labels).any())


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
                return torch.full(shape_of(value), -1)
            return hint(example)
        return hint(value)

    args, kwargs = (node.args if args is None else args), (node.kwargs if kwargs is None else kwargs)
    filled = pytree.tree_map(fill, (tuple(args), dict(kwargs)), is_leaf=lambda v: isinstance(v, fx.Node))
    # Labels are laid out in memory as they come; a view that the traced strides allow is a reshape here.
    target: Any = torch.ops.aten.reshape.default if operation(node) in ("view", "_unsafe_view") else node.target
    result = target(*filled[0], **filled[1])
    return tuple(result) if isinstance(result, (list, tuple)) else result


def constant_of(node: fx.Node) -> Tensor | None:
    """The value of a node that is a tensor made while tracing."""
    while effect(node) is Effect.SAME:
        node = arguments(node)[0]
    return node.meta.get("constant")


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


def _move(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels:
    if operation(node) == "constant_pad_nd":
        return run_on_labels(node, flow.labels, (*arguments(node)[:2], -1), {})
    if operation(node) == "pad" and (len(node.args) < 3 or arguments(node)[2] == "constant"):
        return run_on_labels(node, flow.labels, (*arguments(node)[:2], "constant", -1), {})
    return run_on_labels(node, flow.labels)


def _same(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels:
    return flow.labels[operands[0]]


def _unary(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels:
    flow.nonlinear[node] = operation(node)
    return flow.labels[operands[0]]


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
    same = all(torch.equal(meeting[0], other) for other in meeting[1:])
    if len(operands) > 1 or _uses(node, operands[0]) > 1:
        if not (same and effect(node) is Effect.SUM):
            flow.nonlinear[node] = name
    elif effect(node) is Effect.SUM:
        if name.removesuffix("_") != "add" or not _is_zero(node):
            flow.nonlinear[node] = name
    elif name.removesuffix("_") in ("mul", "div") and _scales(node, operands[0]):
        side = next((n for n in node.all_input_nodes if n is not operands[0]), None)
        if side is not None and _per_feature(side, result):
            flow.nonlinear[node] = name
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


def _per_feature(side: fx.Node, labels: Tensor) -> bool:
    """Whether an operand without features differs from feature to feature, told by its shape."""
    shape = shape_of(side)
    aligned = (1,) * (labels.ndim - len(shape)) + shape
    return any(aligned[axis] > 1 for axis in varying_axes(labels))


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
    left_labels, right_labels = flow.labels.get(left), flow.labels.get(right)
    shape = shape_of(node)
    if (
        isinstance(left_labels, Tensor)
        and varying_axes(left_labels)
        and left_labels.ndim - 1 in varying_axes(left_labels)
    ):
        summed_left = True
    else:
        summed_left = False
    summed_right = isinstance(right_labels, Tensor) and right_labels.ndim - 2 in varying_axes(right_labels)
    if summed_left or summed_right:
        return _contract(node, left_labels, right_labels, flow)
    if isinstance(left_labels, Tensor) and isinstance(right_labels, Tensor):
        flow.nonlinear[node] = operation(node)
        flow.unknown.append(node)
        return None
    if isinstance(right_labels, Tensor):
        return right_labels.narrow(-2, 0, 1).expand(*shape).clone()
    assert isinstance(left_labels, Tensor)
    return left_labels.narrow(-1, 0, 1).expand(*shape).clone()


def _contract(node: fx.Node, left: Labels | None, right: Labels | None, flow: Flow) -> None:
    """The product of two features: classes of partners are joined, and no feature passes on."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        first = left.narrow(-2, 0, 1).squeeze(-2).expand(*batch, left.shape[-1])
        second = right.narrow(-1, 0, 1).squeeze(-1).expand(*batch, right.shape[-2])
        flow.classes.join(first, second)
        return
    for labels in (left, right):
        if isinstance(labels, Tensor):
            flow.classes.join(labels.reshape(-1)[:-1], labels.reshape(-1)[1:])
    flow.nonlinear[node] = operation(node)


def _attention(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels | None:
    query, key, value = (flow.labels.get(operand) for operand in arguments(node)[:3])
    if isinstance(query, Tensor) and isinstance(key, Tensor):
        partners = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        flow.classes.join(query[:, :, 0], partners[:, :, 0])
    if not isinstance(value, Tensor):
        return None
    shape = shape_of(node)
    heads_axis = 2 if operation(node) == "attention" else 1
    shared = value[:, :, :1]  # (B, G, 1, e)
    heads = shared.repeat_interleave(shape[heads_axis] // shared.shape[1], dim=1)
    return (heads.transpose(1, 2) if heads_axis == 2 else heads).expand(shape).clone()


def _cache(node: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> Labels:
    result = []
    for operand, example in zip(arguments(node)[:2], node.meta["val"], strict=True):
        labels = flow.labels.get(operand)
        shape = tuple(int(hint(size)) for size in example.shape)
        if isinstance(labels, Tensor):
            result.append(labels.narrow(-2, 0, 1).expand(shape).clone())
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
