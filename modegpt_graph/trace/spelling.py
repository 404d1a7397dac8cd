"""Operations said in simpler ones, and said once: what is known of `mul` and `sigmoid` is then known of `glu` too."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from modegpt_graph.trace.operations import arguments, operation

aten = torch.ops.aten


def call_like(graph: fx.Graph, replaced: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A node in the place of `replaced`, with the value that its operation gives on the examples."""
    node = graph.call_function(target, args)
    examples: Mapping[str, Any] = replaced.meta
    node.meta = {key: value for key, value in examples.items() if key != "val"}
    with examples["val"].fake_mode:
        node.meta["val"] = target(*fx.map_arg(args, lambda operand: operand.meta["val"]))
    return node


def spell_out(graph: fx.Graph) -> None:
    """Replace every operation that has such a form by it. The graph is changed."""
    for node in list(graph.nodes):
        form = _FORMS.get(operation(node))
        if form is not None and node.op == "call_function" and not node.kwargs:
            with graph.inserting_before(node):
                node.replace_all_uses_with(form(graph, node))
            graph.erase_node(node)


def _glu(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """x₁ · sigmoid(x₂), for the two halves of an axis."""
    value, axis = [*arguments(node), -1][:2]
    half = value.meta["val"].shape[axis] // 2
    first = call_like(graph, node, aten.slice.Tensor, value, axis, 0, half)
    second = call_like(graph, node, aten.slice.Tensor, value, axis, half, 2 * half)
    return call_like(graph, node, aten.mul.Tensor, first, call_like(graph, node, aten.sigmoid.default, second))


def _prelu(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """x where it is positive, else x times a slope: one of all, or one for each place along the second axis."""
    value, slope = arguments(node)[:2]
    if slope.meta["val"].numel() > 1:
        sizes = [-1 if axis == 1 else 1 for axis in range(value.meta["val"].ndim)]
        slope = call_like(graph, node, aten.reshape.default, slope, sizes)
    below = call_like(graph, node, aten.mul.Tensor, slope, value)
    positive = call_like(graph, node, aten.gt.Scalar, value, 0)
    return call_like(graph, node, aten.where.self, positive, value, below)


def _other_name(target: Any) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    """The form of an operation that has two names, under the one that is known."""
    return lambda graph, node: call_like(graph, node, target, *arguments(node))


def _type_as(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A cast to the dtype of another value, of which nothing else is read."""
    value, other = arguments(node)[:2]
    return call_like(graph, node, aten.to.dtype, value, other.meta["val"].dtype)


_FORMS: Mapping[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "glu": _glu,
    "prelu": _prelu,
    "type_as": _type_as,
    "multiply": _other_name(aten.mul.Tensor),
    "divide": _other_name(aten.div.Tensor),
    "true_divide": _other_name(aten.div.Tensor),
    "subtract": _other_name(aten.sub.Tensor),
}


_STARTS = {"slice": 2, "slice_scatter": 3}  # which argument says where a part starts, where nothing does for the first


def merge_equal(graph: fx.Graph) -> None:
    """Make one node of those that apply the same operation to the same values in one module. The graph is changed.

    A function that is written twice in a formula (`gate(x) * sigmoid(gate(x))`) is one value in the graph then.
    """
    known: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_pure(node):
            continue
        start = _STARTS.get(operation(node))
        if start is not None and len(node.args) > start and node.args[start] is None:
            node.args = (*node.args[:start], 0, *node.args[start + 1 :])
        leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
        if any(isinstance(leaf, (torch.SymInt, torch.Tensor)) for leaf in leaves):
            continue
        key = (node.target, tuple((type(leaf), leaf) for leaf in leaves), structure, _module(node))
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _module(node: fx.Node) -> str:
    """Path of the innermost module in which a node is computed: what modules compute alike stays their own."""
    places = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return places[-1] if places else ""


def _is_pure(node: fx.Node) -> bool:
    """Whether an operation gives the same for the same operands, and changes none of them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return operation(node) == "getitem"
    tags = getattr(node.target, "tags", ())
    return getattr(node.target, "namespace", "") == "aten" and not (
        schema.is_mutable or torch.Tag.nondeterministic_seeded in tags
    )
