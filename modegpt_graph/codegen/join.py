"""Several ways through one module as one forward method, which tells by its arguments which of them a call takes."""

import ast
from collections.abc import Sequence
from dataclasses import replace

from modegpt_graph.codegen.emit import Forward

_INDENT = "    "


def prefix_of(number: int) -> str:
    """What stands before the names that the n-th way (1, 2, …) reads, so that they are not those of another."""
    return f"way_{number}_"


def names_in(condition: str) -> set[str]:
    """Names of the arguments that a condition asks for."""
    return {node.id for node in ast.walk(ast.parse(condition)) if isinstance(node, ast.Name)}


def joined(main: Forward, others: Sequence[tuple[str, Forward]]) -> Forward:
    """`main`, preceded by each of the others under its condition, tried in order. All have one signature."""
    definition, body = _parts(main)
    lines = list(definition)
    for condition, other in others:
        lines.append(f"{_INDENT}if {condition}:")
        lines += [f"{_INDENT}{line}" if line else line for line in _parts(other)[1]]
    imports, attributes, buffers = dict(main.imports), dict(main.attributes), dict(main.buffers)
    for _, other in others:
        imports |= other.imports
        attributes |= other.attributes
        buffers |= other.buffers
    source = "\n".join([*lines, *body])
    return replace(main, source=f"{source}\n", imports=imports, attributes=attributes, buffers=buffers)


def _parts(forward: Forward) -> tuple[list[str], list[str]]:
    """(lines of the definition, lines of the body) of a forward method."""
    (function,) = ast.parse(forward.source).body
    assert isinstance(function, ast.FunctionDef)
    lines = forward.source.splitlines()
    first = function.body[0].lineno - 1
    return lines[:first], lines[first:]
