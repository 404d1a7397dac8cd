"""A trace in one dtype made right for another: what a module reads off its dtype (`torch.finfo(x.dtype).min`) is not
baked in."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from modegpt_graph.trace.calls import Call
from modegpt_graph.trace.export import Trace, export
from modegpt_graph.trace.limits import DtypeLimit
from modegpt_graph.trace.sizes import steps_without_casts

Exporter = Callable[[nn.Module, Call], Trace]
_LIMITS = ("min", "max", "eps", "tiny")


def exporter(traced: torch.dtype | None, own: torch.dtype | None) -> Exporter:
    """`export`, for a module on the meta device in dtype `traced` that will run in dtype `own`.

    Where the module does other things in the two, the trace is that in its own dtype.
    """
    if own is None or traced is None or own is traced:
        return export

    def export_right(module: nn.Module, call: Call) -> Trace:
        trace = export(module, call)
        changed = copy.deepcopy(module)
        changed._apply(lambda tensor: tensor.to(own) if tensor.dtype is traced else tensor)
        tensors = tuple(tensor.to(own) if tensor.dtype is traced else tensor for tensor in call.tensors)
        right = export(changed, replace(call, tensors=tensors))
        if _take_constants(trace, right, traced, own):
            return trace
        return replace(right, module=module, call=call)

    return export_right


def _take_constants(trace: Trace, right: Trace, traced: torch.dtype, own: torch.dtype) -> bool:
    """Put the constants of `right` into `trace`, where the two differ in nothing else; whether that is so."""
    steps, others = steps_without_casts(trace), steps_without_casts(right)
    if len(steps) != len(others) or str(trace.output) != str(right.output):
        return False
    changes: list[tuple[fx.Node, Any, Any]] = []
    for one, other in zip(steps, others, strict=True):
        if one.op != other.op or (one.op == "call_function" and one.target is not other.target):
            return False
        if one.op == "call_function":
            try:
                args, kwargs = _merged((one.args, one.kwargs), (other.args, other.kwargs), traced, own)
            except ValueError:
                return False
            changes.append((one, args, kwargs))
    for node, args, kwargs in changes:
        node.args, node.kwargs = args, kwargs
    return True


def _merged(one: Any, other: Any, traced: torch.dtype, own: torch.dtype) -> Any:
    """The arguments `one`, with the floating-point constants of `other`. Raises ValueError where more differs."""
    if isinstance(one, (list, tuple, dict)):
        if type(one) is not type(other) or len(one) != len(other):
            raise ValueError
        if isinstance(one, dict):
            return {key: _merged(value, other[key], traced, own) for key, value in one.items()}
        merged = [_merged(a, b, traced, own) for a, b in zip(one, other, strict=True)]
        return tuple(merged) if isinstance(one, tuple) else type(one)(merged)
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        return one
    if isinstance(one, float) and isinstance(other, float):
        return one if one == other or one != one else _limit(one, other, traced, own)
    if isinstance(one, torch.dtype) and isinstance(other, torch.dtype):
        if other is not one and (one, other) != (traced, own):
            raise ValueError
        return one
    if isinstance(one, (torch.SymInt, torch.SymFloat)) and type(one) is type(other):
        return one
    if type(one) is not type(other) or (not isinstance(one, Tensor) and one != other):
        raise ValueError
    return one


def _limit(one: float, other: float, traced: torch.dtype, own: torch.dtype) -> float:
    """A constant that differs between the dtypes: by name where it is one of their limits, else its right value."""
    for sign in (1, -1):
        for name in _LIMITS:
            if (one, other) == tuple(sign * getattr(torch.finfo(dtype), name) for dtype in (traced, own)):
                return DtypeLimit(other, name, sign)
    return other
