"""The formula language of pattern files: calls, products, sums and names. Parsed, never executed.

formula := term ("+" term)*      term := factor ("*" factor)*      factor := name | name "(" formula, … ")" | "(" … ")"
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeGuard

from modegpt_graph.errors import InputError

LONGEST_FORMULA = 1000
DEEPEST_FORMULA = 32
FORMULA_MARKS = "a formula is names, brackets, commas, `*` and `+`"


class FormulaError(InputError):
    """A formula that cannot be read; `column` (from 1) is where."""

    def __init__(self, message: str, column: int) -> None:
        super().__init__(message)
        self.column = column


@dataclass(frozen=True)
class Name:
    """A variable (`x`), or `_` for anything; `column` (from 1) is where it stands."""

    name: str
    column: int = field(default=1, compare=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Apply:
    """A role or an operation applied to arguments; `column` (from 1) is where its name stands."""

    name: str
    arguments: tuple["Expression", ...]
    column: int = field(default=1, compare=False)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.arguments))})"


@dataclass(frozen=True)
class Combine:
    """A product or a sum of two or more parts, in any order."""

    operator: str  # "*" or "+"
    parts: tuple["Expression", ...]

    def __str__(self) -> str:
        shown = (f"({p})" if isinstance(p, Combine) and self.operator == "*" else str(p) for p in self.parts)
        return f" {self.operator} ".join(shown)


Expression = Name | Apply | Combine

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN = re.compile(rf"\s*(?:(?P<name>{NAME.pattern})|(?P<mark>[()*+,]))")


def _tokens(text: str) -> list[tuple[str, int]]:
    found, position = [], 0
    while text[position:].strip():
        token = _TOKEN.match(text, position)
        if token is None:
            column = position + len(text[position:]) - len(text[position:].lstrip()) + 1
            raise FormulaError(f"unexpected character {text[column - 1]!r}; {FORMULA_MARKS}", column)
        found.append((token["name"] or token["mark"], token.end() - len(token["name"] or token["mark"]) + 1))
        position = token.end()
    return found


def _is_same(part: "Expression", operator: str) -> TypeGuard[Combine]:
    return isinstance(part, Combine) and part.operator == operator


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.index = text, _tokens(text), 0

    def peek(self) -> str | None:
        return self.tokens[self.index][0] if self.index < len(self.tokens) else None

    def shown(self) -> str:
        token = self.peek()
        return "the end" if token is None else f"`{token}`"

    def column(self) -> int:
        return self.tokens[self.index][1] if self.index < len(self.tokens) else len(self.text) + 1

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise FormulaError(f"expected `{expected}`, found {self.shown()}", self.column())
        self.index += 1

    def combined(self, operator: str, depth: int) -> Expression:
        if depth > DEEPEST_FORMULA:
            raise FormulaError(f"nested deeper than {DEEPEST_FORMULA} levels", self.column())
        parts = [self.combined("*", depth) if operator == "+" else self.factor(depth)]
        while self.peek() == operator:
            self.index += 1
            parts.append(self.combined("*", depth) if operator == "+" else self.factor(depth))
        if len(parts) == 1:
            return parts[0]
        # Brackets within a product of products mean nothing: the graph's own brackets are not the formula's.
        flat = [one for part in parts for one in (part.parts if _is_same(part, operator) else (part,))]
        return Combine(operator, tuple(flat))

    def factor(self, depth: int) -> Expression:
        token, column = self.peek(), self.column()
        if token == "(":
            self.index += 1
            inner = self.combined("+", depth + 1)
            self.take(")")
            return inner
        if token is None or not (token[0].isalpha() or token[0] == "_"):
            raise FormulaError(f"expected a name, found {self.shown()}", column)
        self.index += 1
        if self.peek() != "(":
            return Name(token, column)
        self.index += 1
        arguments = [self.combined("+", depth + 1)]
        while self.peek() == ",":
            self.index += 1
            arguments.append(self.combined("+", depth + 1))
        self.take(")")
        return Apply(token, tuple(arguments), column)


@lru_cache(maxsize=256)
def parse(text: str) -> Expression:
    """Read a formula. Raises FormulaError with the column where it cannot be read."""
    if len(text) > LONGEST_FORMULA:
        raise FormulaError(f"a formula longer than {LONGEST_FORMULA} characters", LONGEST_FORMULA + 1)
    if not text.strip():
        raise FormulaError("the formula is empty", 1)
    parser = _Parser(text)
    expression = parser.combined("+", 0)
    if parser.peek() is not None:
        raise FormulaError(f"unexpected {parser.shown()}", parser.column())
    return expression


def parts_of(expression: Expression) -> Iterator[Expression]:
    """An expression and everything in it, outermost first."""
    yield expression
    for part in getattr(expression, "arguments", getattr(expression, "parts", ())):
        yield from parts_of(part)


def applications(expression: Expression) -> Iterator[Apply]:
    """Every application in an expression, outermost first."""
    return (part for part in parts_of(expression) if isinstance(part, Apply))
