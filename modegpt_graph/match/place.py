"""Where a traced operation stands, in words that a person can look up: its module, and the line that wrote it."""

import re
from pathlib import Path, PurePath

import torch
from torch import fx

_TORCH = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def place_of(node: fx.Node) -> str:
    """E.g. "`layers.0.mlp` (modeling.py:15)": the innermost module, and the last line of it that is not torch's own."""
    stack = [where for where, _ in (node.meta.get("nn_module_stack") or {}).values()]
    module = stack[-1].removeprefix("module").removeprefix(".") if stack else ""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    lines = [f"{PurePath(file).name}:{line}" for file, line in frames if not file.startswith(_TORCH)]
    where = f"`{module}`" if module else f"`{node.name}`"
    return f"{where} ({lines[-1]})" if lines else where
