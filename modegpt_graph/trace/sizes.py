"""Whether a trace with symbolic sizes is right at other sizes: what the module does there, compared step by step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.operations import Effect, arguments, effect, is_data, operation
from modegpt_graph.trace.stores import stores_of

_MANY = 2**40  # an upper bound beyond which there is none


def fixed_axis(trace: Trace) -> tuple[int, int] | None:
    """(tensor, axis) of the call that should have any size, and has but one in the trace; None without one."""
    for index, shape in _shapes(trace):
        for axis in trace.call.dynamic[index]:
            if _known(shape[axis]) is not None:
                return index, axis
    return None


def range_of(trace: Trace, tensor: int, axis: int) -> tuple[int, int | None]:
    """Smallest and largest size of a call's axis that the trace holds for; None where there is no largest."""
    for index, shape in _shapes(trace):
        size = shape[axis] if index == tensor else None
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            found = size.node.shape_env.var_to_range[size.node.expr]
            bounded = found.upper.is_Integer and int(found.upper) < _MANY
            return int(found.lower), int(found.upper) if bounded else None
    return 2, None


def does_the_same(trace: Trace, at: Trace) -> bool:
    """Whether a module does at fixed sizes (`at`, its trace for these alone) what `trace` says for any."""
    values = _symbols(trace, at)
    if values is None or str(trace.output) != str(at.output):
        return False
    comparison = _Comparison(values)
    steps, others = ([node for node in _steps(one) if not comparison.changes_nothing(node)] for one in (trace, at))
    return len(steps) == len(others) and all(
        comparison.agree(trace, one, at, other) for one, other in zip(steps, others, strict=True)
    )


@dataclass
class _Comparison:
    """values: symbol → its size.   pairs: node → the node that stands for it in the other trace."""

    values: dict[Any, int]
    pairs: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def agree(self, trace: Trace, one: fx.Node, at: Trace, other: fx.Node) -> bool:
        self.pairs[one] = other
        if one.op == "placeholder" or other.op == "placeholder":
            return one.op == other.op and _held(trace, one) == _held(at, other)
        if one.op != other.op:
            return False
        return one.target is other.target and self.equal((_said(one), one.kwargs), (_said(other), other.kwargs))

    def resolved(self, value: Any) -> Any:
        """A node without the copies, no-op casts and whole slices before it."""
        while isinstance(value, fx.Node) and self.changes_nothing(value):
            value = value.args[0]
        return value

    def changes_nothing(self, node: fx.Node) -> bool:
        """Whether a node is its first operand, at these sizes."""
        if _is_same(node):
            return True
        if node.op != "call_function" or operation(node) != "slice":
            return False
        source, axis, start, stop, step = _said(node)
        size = self.number(source.meta["val"].shape[axis])
        first, last = self.number(start), self.number(stop)
        return isinstance(last, int) and (first, step) == (0, 1) and last >= size

    def equal(self, one: Any, other: Any) -> bool:
        if isinstance(one, (list, tuple)):
            return (
                isinstance(other, (list, tuple))
                and len(one) == len(other)
                and all(self.equal(a, b) for a, b in zip(one, other, strict=True))
            )
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(self.equal(one[key], other[key]) for key in one)
        one, other = self.resolved(one), self.resolved(other)
        if isinstance(one, fx.Node) and not _is_size(one):
            return self.pairs.get(one) is other
        first, second = self.number(one), self.number(other)
        return type(first) is type(second) and first == second

    def number(self, value: Any) -> Any:
        """A size at these sizes; any other constant as it is."""
        value = value.meta.get("val") if isinstance(value, fx.Node) else value
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            found = value.node.expr.xreplace(self.values)
            return float(found) if isinstance(value, torch.SymFloat) else int(found)
        return value


def _said(node: fx.Node) -> list[Any]:
    """A node's arguments; those of a slice in one of their several forms."""
    args = arguments(node)
    if operation(node) != "slice":
        return args
    source, axis, start, stop, step = [*args, *(0, None, None, 1)[len(args) - 1 :]]
    whole = stop is None or (isinstance(stop, int) and stop >= _MANY)
    return [source, axis, start or 0, source.meta["val"].shape[axis] if whole else stop, step]


def _known(size: Any) -> int | None:
    """A size that is a number; None where it may be any."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression) if expression.is_number else None


def _shapes(trace: Trace) -> Iterator[tuple[int, Any]]:
    for node in trace.graph.nodes:
        if node.name in trace.inputs:
            yield trace.inputs[node.name], node.meta["val"].shape


def _symbols(trace: Trace, at: Trace) -> dict[Any, int] | None:
    """Symbol → its size in the other trace's call; None where a size is fixed to another."""
    values: dict[Any, Any] = {}
    if len(trace.call.tensors) != len(at.call.tensors):
        return None
    for index, shape in _shapes(trace):
        given = at.call.tensors[index].shape
        if len(shape) != len(given):
            return None
        for size, found in zip(shape, given, strict=True):
            if _known(size) not in (None, int(found)):
                return None
            symbol = size.node.expr if isinstance(size, torch.SymInt) else None
            if isinstance(symbol, sympy.Symbol) and values.setdefault(symbol, sympy.Integer(int(found))) != int(found):
                return None
    return values


def _is_same(node: fx.Node) -> bool:
    if node.op != "call_function" or effect(node) is not Effect.SAME or not node.args:
        return False
    source: Any = node.args[0]
    return node.meta["val"].dtype == source.meta["val"].dtype


def steps_without_casts(trace: Trace) -> list[fx.Node]:
    """What `trace` computes, step by step, without copies and without casts of any kind."""
    return [node for node in _steps(trace) if node.op != "call_function" or effect(node) is not Effect.SAME]


def _steps(trace: Trace) -> list[fx.Node]:
    """Nodes that the outputs and later calls need: inputs, parameters and constants first, then operations in order."""
    numbers = {index for _, index in trace.call.numbers()}
    queue: list[fx.Node] = [*trace.graph.output_node().all_input_nodes, *stores_of(trace.graph)]
    live: set[fx.Node] = set()
    while queue:
        node = queue.pop()
        if node not in live:
            live.add(node)
            queue += node.all_input_nodes
    given = (node for node in live if node.op == "placeholder" and trace.inputs.get(node.name) not in numbers)
    held = sorted(given, key=lambda node: str(_held(trace, node)))
    done = (node for node in trace.graph.nodes if node in live and node.op == "call_function" and is_data(node))
    moved = (node for node in done if not _is_size(node))
    return [*held, *moved, trace.graph.output_node()]


def _held(trace: Trace, node: fx.Node) -> tuple[str, object]:
    """What a placeholder stands for: which input, the name of a parameter, or the values of a constant."""
    if node.name in trace.inputs:
        return "input", trace.inputs[node.name]
    if node.name in trace.state:
        return "state", trace.state[node.name]
    constant = trace.constants[node.name]
    known = not isinstance(constant, FakeTensor) and not constant.is_meta
    return "constant", (str(constant.dtype), constant.tolist() if known else id(constant))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
