"""What a forward method is called with: its definition, and the expressions that read inputs and sizes from it."""

import inspect
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

from modegpt_graph.codegen.expressions import EmitError, literal
from modegpt_graph.codegen.layout import atom
from modegpt_graph.trace.calls import CacheSlot, Path
from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.operations import Effect, effect

LEADING = ("batch", "length")


class Signature:
    """The signature of a traced module's forward.

    fed: nodes that are multiplied by matrices.   inputs: placeholder → the expression that reads it.
    main: the input that sizes, dtype and device are read from, one of `fed` where there is one.
    """

    def __init__(self, trace: Trace, fed: Collection[fx.Node]) -> None:
        self.trace = trace
        self.parameters = inspect.signature(trace.module.forward).parameters
        self.keywords = next((p.name for p in self.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        self.inputs = self._input_expressions()
        self.main = self._main_input(fed)
        self._leading: dict[str, str] = {}
        self._sizes = self._size_expressions()
        self._used: set[str] = set()
        cached = self._cached_size()
        if cached is not None:
            self._sizes[cached] = "key_states.size(-2)"

    def main_expression(self) -> str:
        """The main input as source."""
        return self.inputs[self.main.name]

    def size(self, size: torch.SymInt) -> str:
        """A size as source. Raises EmitError where no input has it."""
        text = str(size)
        if text not in self._sizes:
            raise EmitError(f"the size {text} cannot be read from the inputs")
        self._used.add(self._sizes[text])
        return self._sizes[text]

    def leading_sizes(self) -> list[str]:
        """The statement that reads batch and length, as far as they have been used."""
        used = [name for name in LEADING if name in self._used]
        if len(used) == len(LEADING):
            return [f"{', '.join(LEADING)} = {atom(self.main_expression())}.shape[:{len(LEADING)}]"]
        return [f"{name} = {self._leading[name]}" for name in used]

    def cache(self) -> str:
        """The cache as source. Raises EmitError where the module is not given one."""
        for name, value in self.trace.call.arguments.items():
            if isinstance(value, CacheSlot):
                return name if name not in self.trace.call.extra else f'kwargs.get("{name}")'
        raise EmitError("the cache is not among the arguments of the module")

    def definition(self) -> str:
        """`def forward(self, …):`, with the module's own names and defaults."""
        parts, starred = ["self"], False
        for parameter in self.parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not starred:
                parts.append("*")
                starred = True
            starred |= parameter.kind is parameter.VAR_POSITIONAL
            prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
            default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
            parts.append(f"{prefix}{parameter.name}{default}")
        return f"def forward({', '.join(parts)}):"

    def _input_expressions(self) -> dict[str, str]:
        return self._said(self.trace.call.inputs())

    def _said(self, places: Iterable[tuple[Path, int]]) -> dict[str, str]:
        """Placeholder → what stands in the place of its argument, as source. places: (path, index) of each."""
        by_index: dict[int, str] = {}
        for path, index in places:
            first, *rest = path
            text = first.lstrip("*") if first not in self.trace.call.extra else f'{self.keywords}["{first}"]'
            by_index[index] = text + "".join(f"[{key!r}]" for key in rest)
        return {placeholder: by_index[index] for placeholder, index in self.trace.inputs.items() if index in by_index}

    def _nodes(self) -> list[fx.Node]:
        return [node for node in self.trace.graph.nodes if node.name in self.inputs]

    def _main_input(self, fed: Collection[fx.Node]) -> fx.Node:
        inputs = self._nodes()
        feeding = [node for node in fed if node in inputs]
        floating = [node for node in inputs if node.meta["val"].is_floating_point()]
        return (feeding or floating or inputs)[0]

    def _size_expressions(self) -> dict[str, str]:
        """Symbolic size → the expression that reads it, from the main input where it has that size."""
        found: dict[str, str] = {}
        for node in sorted(self._nodes(), key=lambda node: node is not self.main):
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    found.setdefault(str(size), f"{self.inputs[node.name]}.size({axis})")
        numbers = self._said(self.trace.call.numbers())
        for node in self.trace.graph.nodes:
            if node.name in numbers:
                found[str(node.meta["val"].shape[0])] = numbers[node.name]
        for axis, name in enumerate(LEADING):
            said = f"{self.main_expression()}.size({axis})"
            if said in found.values() and not set(LEADING) & set(self.parameters):
                self._leading[name] = said
        return {
            size: next((n for n, said in self._leading.items() if said == text), text) for size, text in found.items()
        }

    def _cached_size(self) -> str | None:
        """The number of tokens in the cache, where only what the update returns is sure to tell it: a mask may be None.

        None where the main input has that size too, or it is used before the update.
        """
        used = {str(size) for size in self.main.meta["val"].shape}
        for node in self.trace.graph.nodes:
            if effect(node) is Effect.CACHE:
                size = str(node.meta["val"][0].shape[-2])
                return None if size in used else size
            if effect(node) is not Effect.SIZE:
                used |= {str(one.meta["val"]) for one in node.all_input_nodes if effect(one) is Effect.SIZE}
        return None


def _default(value: Any) -> str:
    try:
        return literal(value)
    except EmitError:
        return "None"
