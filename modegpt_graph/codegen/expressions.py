"""One operation as one Python expression, written as a person would."""

import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from modegpt_graph.codegen.layout import atom, infix
from modegpt_graph.errors import ModegptError

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", "floordiv": "//", "mod": "%"}
_METHODS = {
    "view",
    "reshape",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "contiguous",
    "flatten",
    "softmax",
    "mean",
    "sum",
    "tanh",
    "sigmoid",
    "relu",
    "exp",
    "sqrt",
    "rsqrt",
    "pow",
    "clone",
    "repeat",
    "t",
    "chunk",
    "float",
    "type_as",
    "masked_fill",
    "bmm",
    "movedim",
    "roll",
    "index_select",
    "abs",
    "square",
    "repeat_interleave",
    "unflatten",
    "clamp",
    "unbind",
    "narrow",
    "expand_as",
    "view_as",
    "flip",
    "baddbmm",
    "detach",
}
_LAST = 2**63 - 1


class EmitError(ModegptError):
    """A graph that cannot be written as Python."""


def identifier(name: str) -> str:
    """A name made fit for Python."""
    cleaned = re.sub(r"\W", "_", name)
    return f"_{cleaned}" if cleaned[:1].isdigit() or keyword.iskeyword(cleaned) else cleaned


def attribute(name: str) -> str:
    """What a module holds under a dotted path: `layers.0.mlp` → `self.layers[0].mlp`."""
    text = "self"
    for part in name.split("."):
        text += f"[{part}]" if part.isdigit() or part[:1] in "'\"" else f".{part}"
    return text


def literal(value: Any) -> str:
    """A constant as Python source. Raises EmitError for values that have none."""
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, float):
        return repr(float(value))
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    raise EmitError(f"a constant of type {type(value).__name__} has no Python source")


def call(name: str, target: Any, args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str:
    """An operation applied to arguments that are written already.

    name: plain name of the operation.   raw: the arguments themselves, to tell constants from expressions.
    """
    special = _SPECIAL.get(name, _SPECIAL.get(name.removesuffix("_")))
    if special is not None:
        written = special(args, kwargs, raw)
        if written is not None:
            return written
    # Writes into an operand that something else reads are gone from the trace; the others are plain operations.
    name = name.removesuffix("_") if not name.startswith("_") else name
    if name in _INFIX and len(args) == 2 and not kwargs:
        return infix(args[0], _INFIX[name], args[1])
    rest = [*args[1:], *(f"{key}={value}" for key, value in kwargs.items())]
    if name in _METHODS and args and not isinstance(raw[0], (bool, int, float)):
        flat = [
            item.strip("[]") if name in ("view", "reshape", "expand", "permute", "repeat") and n == 0 else item
            for n, item in enumerate(rest)
        ]
        return f"{atom(args[0])}.{name}({', '.join(flat)})"
    if getattr(target, "namespace", None) == "aten" or hasattr(target, "_opname"):
        overload = getattr(target, "_overloadname", "default")
        return f"torch.ops.{target.namespace}.{target._opname}.{overload}({', '.join([*args, *rest[len(args) - 1 :]])})"
    raise EmitError(f"the operation `{name}` cannot be written as Python")


def _slice(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str | None:
    axis = raw[1] if len(raw) > 1 else 0
    start = args[2] if len(args) > 2 and raw[2] not in (None, 0) else ""
    stop = args[3] if len(args) > 3 and raw[3] is not None and raw[3] != _LAST else ""
    step = f":{args[4]}" if len(args) > 4 and raw[4] != 1 else ""
    if not start and not stop and not step:
        return args[0]
    window = f"{start}:{stop}{step}"
    return f"{atom(args[0])}[{'..., ' if axis == -1 else ':, ' * axis}{window}]" if axis >= -1 else None


def _select(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str | None:
    axis = raw[1]
    if axis < -1:
        return None
    return f"{atom(args[0])}[{'..., ' if axis == -1 else ':, ' * axis}{args[2]}]"


def _pow(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str | None:
    return f"torch.pow({args[0]}, {args[1]})" if isinstance(raw[0], (int, float)) else None


def _gather(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str | None:
    """The form that broadcasts, where only the gathered axis differs in size: a table may come for one sequence."""
    axis, (table, index) = raw[1], (tuple(node.meta["val"].shape) for node in (raw[0], raw[2]))
    others = [place for place in range(len(table)) if place != axis % len(table)]
    if kwargs or not isinstance(axis, int) or any(str(table[place]) != str(index[place]) for place in others):
        return None
    return f"torch.take_along_dim({args[0]}, {args[2]}, {axis})"


def _neg(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str:
    return f"-{atom(args[0])}"


def _function(path: str) -> Callable[..., str]:
    def write(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str:
        return f"{path}({', '.join([*args, *(f'{key}={value}' for key, value in kwargs.items())])})"

    return write


def _split(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str:
    axis = args[2] if len(args) > 2 else kwargs.get("dim", "0")
    return f"{atom(args[0])}.split({args[1]}, dim={axis})"


def _getitem(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str:
    return f"{atom(args[0])}[{args[1]}]"


def _index(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str:
    inner = args[1].strip("[]").replace("None", ":")
    return f"{atom(args[0])}[{inner}]"


def _cast(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str | None:
    dtype = kwargs.get("dtype", args[1] if len(args) > 1 else None)
    return None if dtype is None else f"{atom(args[0])}.to({dtype})"


def _dropout(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str | None:
    is_training = raw[2] if len(raw) > 2 else True
    return args[0] if is_training is False or raw[1] == 0 else None


def _turned(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str:
    return f"{atom(args[0])}.T"


def _view_permute(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str:
    return f"{atom(args[0])}.reshape({args[1][1:-1]}).permute({kwargs['order'][1:-1]})"


def _same(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str:
    return args[0]


def _layer_norm(args: Sequence[str], kwargs: Mapping[str, str], raw: Sequence[Any]) -> str:
    # The operation's last argument chooses a kernel; the function has none such.
    return _function("nn.functional.layer_norm")(args[:5], {}, raw)


_SPECIAL: dict[str, Callable[..., str | None]] = {
    "slice": _slice,
    "select": _select,
    "gather": _gather,
    "neg": _neg,
    "pow": _pow,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "numpy_T": _turned,
    "t": _turned,
    "view_permute": _view_permute,
    "view_as_complex": _function("torch.view_as_complex"),
    "view_as_real": _function("torch.view_as_real"),
    "rms_norm": _function("nn.functional.rms_norm"),
    "sym_max": _function("max"),
    "sym_min": _function("min"),
    "sym_float": _function("float"),
    "cat": _function("torch.cat"),
    "stack": _function("torch.stack"),
    "silu": _function("nn.functional.silu"),
    "gelu": _function("nn.functional.gelu"),
    "linear": _function("nn.functional.linear"),
    "layer_norm": _layer_norm,
    "addmm": _function("torch.addmm"),
    "scaled_dot_product_attention": _function("nn.functional.scaled_dot_product_attention"),
    "split": _split,
    "split_with_sizes": _split,
    "getitem": _getitem,
    "index": _index,
    "_to_copy": _cast,
    "to": _cast,
    "alias": _same,
    "lift_fresh_copy": _same,
    "lift_fresh": _same,
    "detach": _same,
}
