"""How what a module keeps is written: only the parts that change, where nothing reads what was there before."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from modegpt_graph.codegen.expressions import EmitError, call
from modegpt_graph.codegen.layout import atom
from modegpt_graph.trace.operations import Effect, arguments, effect, operation

_VIEWS = {
    "slice_scatter": (torch.ops.aten.slice.Tensor, "slice"),
    "select_scatter": (torch.ops.aten.select.int, "select"),
}
_AT_PLACES = frozenset({"index_put", "index_copy"})


@dataclass(frozen=True)
class Write:
    """One write. parts: nodes that say which part of which part of what is kept is written; the last brings the value,
    or else `at_places` does, which says where within that part."""

    parts: tuple[fx.Node, ...]
    at_places: fx.Node | None = None


@dataclass(frozen=True)
class InPlace:
    """A store as writes in place.

    final: the node whose value is what is kept afterwards.   inner: nodes before it that are no values any more.
    """

    kept: fx.Node
    final: fx.Node
    inner: frozenset[fx.Node]
    writes: tuple[Write, ...]


def in_place(store: fx.Node) -> InPlace | None:
    """The writes that make a store; None where what was there before, or in between, is read by anything else."""
    kept, value = arguments(store)
    final, inner = _uncast(value), set[fx.Node]()
    writes = _writes(final, kept, (), inner)
    own = {*inner, final, store}
    if not writes or any(set(node.users) - own for node in inner - {final}):
        return None
    if any(user not in own and effect(user) is not Effect.SIZE for user in kept.users):
        return None
    return InPlace(kept, final, frozenset(inner - {final}), tuple(writes))


def _writes(node: fx.Node, base: fx.Node, parts: tuple[fx.Node, ...], inner: set[fx.Node]) -> list[Write] | None:
    """The writes that lead from `base` to `node`, in order; None where more than writes do."""
    while node is not base and effect(node) is Effect.SAME:
        inner.add(node)
        node = arguments(node)[0]
    if node is base:
        return []
    name = operation(node)
    if name not in _VIEWS and name not in _AT_PLACES:
        return None
    inner.add(node)
    target, value = arguments(node)[:2]
    before = _writes(target, base, parts, inner)
    if before is None:
        return None
    if name in _AT_PLACES:
        return [*before, Write(parts, node)]
    bottom = _bottom(value)
    if bottom is not _uncast(value) and operation(bottom) == _VIEWS[name][1] and _is_same_part(node, bottom):
        inner.add(bottom)
        within = _writes(value, bottom, (*parts, node), inner)
        return None if within is None else [*before, *within]
    return [*before, Write((*parts, node))]


def _bottom(node: fx.Node) -> fx.Node:
    """What a chain of writes begins with."""
    node = _uncast(node)
    while operation(node) in _VIEWS or operation(node) in _AT_PLACES:
        node = _uncast(arguments(node)[0])
    return node


def _uncast(node: fx.Node) -> fx.Node:
    while effect(node) is Effect.SAME:
        node = arguments(node)[0]
    return node


def _is_same_part(scatter: fx.Node, view: fx.Node) -> bool:
    """Whether a view is the part that is written, before it is."""
    target, _, *place = arguments(scatter)
    source, *other = arguments(view)
    return _uncast(source) is _uncast(target) and _place(place) == _place(other)


def _place(given: Sequence[Any]) -> list[Any]:
    """(axis, start, stop, step), or (axis, index)."""
    defaults = [0, None, None, 1]
    whole = [*given, *defaults[len(given) :]]
    return [0 if number == 1 and value is None else value for number, value in enumerate(whole)]


def statement(
    text: str, write: Write, raw: Callable[[fx.Node], Sequence[Any]], said: Callable[[fx.Node, int], str]
) -> str:
    """A write as Python.

    text: what is kept.   raw: the arguments of a node.   said: the n-th of them as source.
    """
    for node in write.parts:
        given = raw(node)
        target, view = _VIEWS[operation(node)]
        place = [said(node, number) for number in range(2, len(given))]
        text = call(view, target, [text, *place], {}, [given[0], *given[2:]])
    node = write.at_places
    if node is None:
        return f"{atom(text)}.copy_({said(write.parts[-1], 1)})"
    if operation(node) == "index_copy":
        return f"{atom(text)}.index_copy_({', '.join(said(node, number) for number in (1, 2, 3))})"
    places = said(node, 1).strip("[]").replace("None", ":")
    return f"{atom(text)}[{places}] = {said(node, 2)}"


def ending(returned: str, kept: Sequence[tuple[str, str]]) -> list[str]:
    """The last statements of a method.

    kept: (what is kept, its new value), which is written once everything else is computed.
    """
    if not kept:
        return [f"return {returned}"]
    news = [f"kept_{number}" for number in range(len(kept))]
    made = [f"{new} = {atom(value)}.clone()" for new, (_, value) in zip(news, kept, strict=True)]
    copied = [f"{place}.copy_({new})" for new, (place, _) in zip(news, kept, strict=True)]
    return [*made, f"result = {returned}", *copied, "return result"]


def refuse_returned(output: fx.Node, kept: Collection[fx.Node]) -> None:
    """Raise where a result is a part of what is written only after everything else."""
    for node in output.all_input_nodes:
        while effect(node) in (Effect.SAME, Effect.MOVE) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        if node in kept:
            raise EmitError(f"it returns a part of `{node.name}`, and writes into that")
