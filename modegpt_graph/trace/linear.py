"""One form for every way to multiply by a weight matrix: `linear`, `addmm`, and matrix products with a parameter.

A tensor of three axes holds one matrix for each expert. Its product is one linear map for every expert, of the tokens
that go there: they stand together along the first axis (`grouped_mm`), or have an axis of experts before them (`bmm`).
Or it is one matrix, of which an axis is spread over two: heads, and the features of each.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.operations import Effect, arguments, effect, operation

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """x W (+ b), found in a graph.

    node: where the product is, its bias added.   source: what is multiplied.
    weight, bias: names in the traced module.   transposed: the parameter is stored (in, out) instead of (out, in).
    experts: how many matrices the parameter holds, one for each expert; None where it is one matrix itself.
    offsets: (experts,) where each expert's tokens end along the first axis of `source`; None where experts are an axis.
    spread: the axes of a parameter with more than two that its outputs stand on, and those of its inputs.
    inner: nodes that belong to the product: those between it and the bias that is added to it.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    transposed: bool
    experts: int | None = None
    offsets: fx.Node | None = None
    spread: tuple[Axes, Axes] | None = None
    inner: tuple[fx.Node, ...] = ()

    @property
    def copies(self) -> int:
        """How many matrices the parameter holds."""
        return 1 if self.experts is None else self.experts

    def shape(self, parameter_shape: tuple[int, ...]) -> tuple[int, int]:
        """(output features, input features) of the parameter, of one expert's matrix where it holds several."""
        if self.spread is not None:
            outputs, inputs = (math.prod(parameter_shape[axis] for axis in axes) for axes in self.spread)
            return outputs, inputs
        rows, columns = parameter_shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self, parameter: Tensor) -> Tensor:
        """The parameter as (out, in), or (experts, out, in); a view of it where it is stored as one matrix."""
        if self.spread is not None:
            outputs, inputs = self.spread
            return parameter.permute(*outputs, *inputs).flatten(-len(inputs)).flatten(0, len(outputs) - 1)
        return parameter.mT if self.transposed else parameter

    def values(self, module: nn.Module, copy: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(out, in) matrix and (out,) bias of the product, or those of all experts; of one where `copy` says which."""
        weight = self.matrix(module.get_parameter(self.weight).detach())
        bias = None if self.bias is None else module.get_parameter(self.bias).detach()
        if bias is not None and self.experts is None:
            bias = bias.flatten()
        return (weight, bias) if copy is None else (weight[copy], None if bias is None else bias[copy])

    def stored(
        self, matrix: Tensor, shape: Sequence[int], rows: Tensor | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """A matrix, or all experts', as the parameter holds it.

        shape: of the parameter when it held all outputs and inputs.   rows, columns: those that `matrix` still has, all
        of them where None.
        """
        if self.spread is None:
            return (matrix.mT if self.transposed else matrix).contiguous()
        order = [*self.spread[0], *self.spread[1]]
        back = sorted(range(len(order)), key=order.__getitem__)
        sizes = (
            _sizes_left(kept, [shape[axis] for axis in axes])
            for kept, axes in zip((rows, columns), self.spread, strict=True)
        )
        return matrix.reshape(*itertools.chain.from_iterable(sizes)).permute(back).contiguous()

    def stored_bias(self, bias: Tensor, shape: Sequence[int], rows: Tensor) -> Tensor:
        """A bias, or all experts', as the parameter holds it that had this shape with all outputs."""
        return bias if self.experts is not None else bias.view(_sizes_left(rows, shape))


def _sizes_left(kept: Tensor | None, sizes: Sequence[int]) -> list[int]:
    """How many places of each axis are kept. kept: places of the flattened axes, as many in every part."""
    if kept is None:
        return list(sizes)
    places = torch.unravel_index(kept, list(sizes))
    return [len(one.unique()) for one in places]


TURNS = {"t", "transpose", "permute", "T", "mT", "numpy_T", "swapaxes"}
ORDERS = TURNS | {"flatten"}  # what makes a matrix of a parameter, and changes none of its values
_GROUPED = {"_grouped_mm", "grouped_mm_fallback"}


def find_linears(trace: Trace) -> dict[fx.Node, Linear]:
    """Node → the product with a parameter that it is, in order."""
    state = {name: parameter.ndim for name, parameter in trace.module.named_parameters() if parameter.ndim >= 2}
    placeholders = {holder: name for holder, name in trace.state.items() if name in state}
    found = (_find_linear(node, trace, placeholders) for node in trace.graph.nodes)
    linears = (_with_bias(one, trace) for one in found if one is not None)
    return {linear.node: linear for linear in linears}


def _parameter(node: object, state: Mapping[str, str]) -> tuple[str, list[Axes]] | None:
    """Name of a parameter, and the axes of it that each axis of `node` is; None where it is more than put in order."""
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function":
        if effect(node) is not Effect.SAME:
            steps.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.name not in state:
        return None
    axes: list[Axes] | None = [(axis,) for axis in range(node.meta["val"].ndim)]
    for step in reversed(steps):
        axes = _put_in_order(step, axes)
        if axes is None:
            return None
    return state[node.name], axes


def _put_in_order(node: fx.Node, axes: list[Axes]) -> list[Axes] | None:
    """The axes after one operation, which exchanges some or makes one of several; None for any other."""
    name, rest = operation(node), arguments(node)[1:]
    if name == "flatten":
        first, last = (axis % len(axes) for axis in [*rest, *(0, -1)[len(rest) :]])
        return [*axes[:first], tuple(one for axis in axes[first : last + 1] for one in axis), *axes[last + 1 :]]
    if name not in TURNS:
        return None
    if name == "permute":
        return [axes[axis] for axis in rest[0]]
    if name in ("transpose", "swapaxes"):
        first, second = (axis % len(axes) for axis in rest)
    elif name == "mT" or len(axes) == 2:
        first, second = len(axes) - 2, len(axes) - 1
    else:
        return axes[::-1]
    exchanged = list(axes)
    exchanged[first], exchanged[second] = axes[second], axes[first]
    return exchanged


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
    weight, axes = found
    bias_name = state_name(bias, trace)
    if bias is not None and bias_name is None:
        return None
    outputs, inputs = axes[-2:] if stored_out_in else axes[:-3:-1]
    linear = Linear(node, source, weight, bias_name, transposed=outputs > inputs)
    if len(axes) == 2:
        if name in _GROUPED or name == "bmm":
            return None
        is_spread = len(outputs) + len(inputs) > 2
        return replace(linear, transposed=False, spread=(outputs, inputs)) if is_spread else linear
    if len(axes) != 3 or axes[0] != (0,):
        return None
    experts = int(trace.module.get_parameter(weight).shape[0])
    if name in _GROUPED and isinstance(offsets, fx.Node):
        return replace(linear, experts=experts, offsets=offsets)
    first = source.meta["val"].shape[0]
    axes_fit = source.meta["val"].ndim == 3 and isinstance(first, int) and first == experts
    return replace(linear, experts=experts) if name in ("bmm", "matmul") and axes_fit else None


def _with_bias(linear: Linear, trace: Trace) -> Linear:
    """The same product with the bias that is added to it; of experts, where a row of a parameter stands for each."""
    users = [user for user in linear.node.users if effect(user) is not Effect.SIZE]
    if linear.bias or len(users) != 1 or operation(users[0]).removesuffix("_") != "add" or users[0].kwargs:
        return linear
    (other,) = [node for node in users[0].all_input_nodes if node is not linear.node] or (None,)
    if other is None or len(other.users) != 1:
        return linear
    name = _row(other, linear, trace) if linear.experts is None else _expert_rows(other, linear, trace)
    return linear if name is None else replace(linear, node=users[0], bias=name, inner=(linear.node, other))


def _row(node: fx.Node, linear: Linear, trace: Trace) -> str | None:
    """Name of the parameter whose values are one for each output of a product."""
    if node.meta["val"].ndim != 1 or node.meta["val"].shape[0] != linear.node.meta["val"].shape[-1]:
        return None
    while node.op == "call_function" and (effect(node) is Effect.SAME or operation(node) == "flatten"):
        node = node.args[0]  # type: ignore[assignment]
    name = state_name(node, trace)
    return name if name in dict(trace.module.named_parameters()) else None


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
