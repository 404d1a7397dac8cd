"""One form for every way to multiply by a weight matrix: `linear`, `addmm`, and matrix products with a parameter.

A tensor of three axes holds one matrix for each expert. Its product is one linear map for every expert, of the tokens
that go there: they stand together along the first axis (`grouped_mm`), or have an axis of experts before them (`bmm`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.operations import Effect, arguments, effect, operation


@dataclass(frozen=True)
class Linear:
    """x W (+ b), found in a graph.

    node: where the product is, its bias added.   source: what is multiplied.
    weight, bias: names in the traced module.   transposed: the parameter is stored (in, out) instead of (out, in).
    experts: how many matrices the parameter holds, one for each expert; None where it is one matrix itself.
    offsets: (experts,) where each expert's tokens end along the first axis of `source`; None where experts are an axis.
    inner: nodes that belong to the product: those between it and the bias that is added to it.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    transposed: bool
    experts: int | None = None
    offsets: fx.Node | None = None
    inner: tuple[fx.Node, ...] = ()

    @property
    def copies(self) -> int:
        """How many matrices the parameter holds."""
        return 1 if self.experts is None else self.experts

    def shape(self, parameter_shape: tuple[int, ...]) -> tuple[int, int]:
        """(output features, input features) of the parameter, of one expert's matrix where it holds several."""
        rows, columns = parameter_shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)


TURNS = {"t", "transpose", "permute", "T", "mT", "numpy_T", "swapaxes"}
_GROUPED = {"_grouped_mm", "grouped_mm_fallback"}


def find_linears(trace: Trace) -> dict[fx.Node, Linear]:
    """Node → the product with a parameter that it is, in order."""
    state = {name: parameter.ndim for name, parameter in trace.module.named_parameters() if parameter.ndim in (2, 3)}
    placeholders = {holder: name for holder, name in trace.state.items() if name in state}
    found = (_find_linear(node, trace, placeholders) for node in trace.graph.nodes)
    linears = (_with_bias(one, trace) if one.experts is not None else one for one in found if one is not None)
    return {linear.node: linear for linear in linears}


def _parameter(node: object, state: Mapping[str, str]) -> tuple[str, bool, int] | None:
    """(name, whether it is turned, axes) of a parameter, read directly or with its last two axes exchanged."""
    turned = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        if operation(node) in TURNS and _turns_last(node):
            turned = not turned
        elif effect(node) is not Effect.SAME:
            return None
        node = node.args[0]
    if isinstance(node, fx.Node) and node.name in state:
        return state[node.name], turned, node.meta["val"].ndim
    return None


def _turns_last(node: fx.Node) -> bool:
    """Whether a transposition exchanges the last two axes and leaves the others."""
    ndim, rest = node.meta["val"].ndim, node.args[1:]
    if ndim == 2:
        return True
    if operation(node) == "permute":
        order = rest[0]
        return [axis % ndim for axis in order] == [*range(ndim - 2), ndim - 1, ndim - 2]  # type: ignore[union-attr,operator]
    axes = [axis % ndim for axis in rest if isinstance(axis, int)]
    return sorted(axes) == [ndim - 2, ndim - 1] or operation(node) == "mT"


def _find_linear(node: fx.Node, trace: Trace, state: Mapping[str, str]) -> Linear | None:
    """`node` as a product with a parameter of `state` (placeholder → name), or None."""
    name, args = operation(node), arguments(node)
    if node.op != "call_function" or not args:
        return None
    bias = offsets = None
    stored_out_in = False
    if name == "linear":
        source, matrix, bias = args[0], args[1], args[2] if len(args) > 2 else None
        stored_out_in = True
    elif name == "addmm":
        bias, source, matrix = args[:3]
    elif name in ("matmul", "mm", "bmm"):
        source, matrix = args[:2]
    elif name in _GROUPED:
        source, matrix, offsets, bias = [*args, *([None] * 4)][:4]
        offsets = node.kwargs.get("offs", offsets)
    else:
        return None
    found = _parameter(matrix, state)
    if found is None or not isinstance(source, fx.Node):
        return None
    weight, turned, axes = found
    bias_name = state_name(bias, trace)
    if bias is not None and bias_name is None:
        return None
    linear = Linear(node, source, weight, bias_name, transposed=stored_out_in == turned)
    if axes == 2:
        return linear if name not in _GROUPED and name != "bmm" else None
    experts = int(trace.module.get_parameter(weight).shape[0])
    if name in _GROUPED and isinstance(offsets, fx.Node):
        return replace(linear, experts=experts, offsets=offsets)
    first = source.meta["val"].shape[0]
    axes_fit = source.meta["val"].ndim == 3 and isinstance(first, int) and first == experts
    return replace(linear, experts=experts) if name in ("bmm", "matmul") and axes_fit else None


def _with_bias(linear: Linear, trace: Trace) -> Linear:
    """The same product with the bias that is added to it, where one row of a parameter stands for each expert."""
    users = [user for user in linear.node.users if effect(user) is not Effect.SIZE]
    if len(users) != 1 or operation(users[0]).removesuffix("_") != "add" or users[0].kwargs:
        return linear
    (other,) = [node for node in users[0].all_input_nodes if node is not linear.node] or (None,)
    if other is None or len(other.users) != 1:
        return linear
    name = _expert_rows(other, linear, trace)
    return linear if name is None else replace(linear, node=users[0], bias=name, inner=(linear.node, other))


def _expert_rows(node: fx.Node, linear: Linear, trace: Trace) -> str | None:
    """Name of the parameter (experts, out) that gives every token of a product the row of its expert."""
    if operation(node) == "index" and linear.offsets is not None:
        table, (experts, *more) = arguments(node)[:2]
        if more or not _comes_from(linear.offsets, experts):
            return None
    elif operation(node) == "unsqueeze" and linear.offsets is None and arguments(node)[1] in (1, -2):
        table = arguments(node)[0]
    else:
        return None
    name = state_name(table, trace)
    return (
        name
        if name is not None and table.meta["val"].shape[0] == linear.copies and table.meta["val"].ndim == 2
        else None
    )


def _comes_from(node: fx.Node, ancestor: fx.Node) -> bool:
    """Whether `node` is computed from `ancestor` alone."""
    while node is not ancestor:
        if len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return True


def state_name(node: object, trace: Trace) -> str | None:
    """Name of the parameter or buffer that `node` is."""
    return trace.state.get(node.name) if isinstance(node, fx.Node) else None
