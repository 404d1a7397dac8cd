"""Calls of one module that one trace is not right for, and the conditions that tell them apart.

A module may be called with other constants within one pass (a block that all layers share), and may go another way at
other sizes (no mask for a single token, a band for many). Each way is traced on its own; the rewritten forward method
tells by its arguments which it is.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch.utils._pytree as pytree

from modegpt_graph.codegen.expressions import literal
from modegpt_graph.errors import ModegptError
from modegpt_graph.trace.calls import SIZES, Call, Sizes, SizeSlot, Slot, plain
from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.precision import Exporter
from modegpt_graph.trace.sizes import does_the_same, fixed_axis, range_of

Pair = tuple[Sizes, Sizes]
ONE_TOKEN: Pair = (Sizes(2, 1, 0), Sizes(3, 1, 0))
ONE_SEQUENCE: Pair = (Sizes(1, 5, 0), Sizes(1, 7, 0))
MANY_TOKENS: Pair = (Sizes(2, 37, 0), Sizes(3, 41, 0))


@dataclass(frozen=True)
class Fork:
    """One more way through a module. condition: Python over the parameters of its forward method."""

    condition: str
    trace: Trace


@dataclass(frozen=True)
class _At:
    """A call as it was seen at some sizes."""

    sizes: Pair
    call: Call


def find_forks(trace: Trace, called: Callable[[Pair], Call | None], export: Exporter) -> tuple[Fork, ...]:
    """The ways through a module beside the traced one, the most special first; their conditions are tried in order.

    called: sizes → how the model calls the module then; None where it cannot be run.   export: what traces it.
    Raises ModegptError where a way cannot be told apart, or holds for no more than the traced sizes.
    """
    return _Finder(trace, called, export).forks()


class _Finder:
    def __init__(self, trace: Trace, called: Callable[[Pair], Call | None], export: Exporter) -> None:
        self._main, self._called, self._export = trace, called, export
        self._module = trace.module
        self._axes = _axes(trace.call)

    def forks(self) -> tuple[Fork, ...]:
        seen = list(self._seen())
        names = sorted({name for at in seen for name in self._differing(at.call)})
        groups: dict[str, list[_At]] = {}
        for at in seen:
            groups.setdefault(self._condition(names, at.call), []).append(at)
        found: list[Fork] = []
        for condition, own in groups.items():
            first, *rest = sorted(own, key=lambda at: at.sizes[0].tokens == 1)
            traced = self._main if first.call is self._main.call else self._traced(first.call)
            _refuse_fixed(traced)
            found += [
                Fork(f"{condition} and {said}" if condition else said, fork)
                for said, fork in self._by_size(traced, first, rest)
            ]
            found += [Fork(condition, traced)] if traced is not self._main else []
        return tuple(sorted(found, key=lambda fork: -fork.condition.count(" and ")))

    def _seen(self) -> Iterator[_At]:
        yield _At(SIZES, self._main.call)
        yield from (_At(SIZES, other) for other in (*self._main.call.others, *self._main.call.also))
        pairs = [ONE_TOKEN, ONE_SEQUENCE, MANY_TOKENS]
        if self._main.branches:
            for _, index in self._main.call.numbers():
                smallest, largest = range_of(self._main, index, 0)
                pairs += [_numbers(smallest - 1)] if smallest > 2 else []
                pairs += [_numbers(largest + 1)] if largest else []
        if self._main.branches and self._axes.tokens is not None:
            smallest, largest = range_of(self._main, *self._axes.tokens)
            pairs += [_tokens(smallest - 1, 2)] if smallest > 3 else []
            pairs += [_tokens(largest + 1, largest + 3), _tokens(3 * largest, 3 * largest + 1)] if largest else []
        for pair in pairs:
            call = self._called(pair)
            also = call.also if call is not None and pair == ONE_TOKEN else ()
            yield from () if call is None else (_At(pair, one) for one in (call, *call.others, *also))

    def _differing(self, call: Call) -> list[str]:
        """Names of the arguments that are not of the kind that the traced call has."""
        main = self._main.call
        names = dict.fromkeys([*main.arguments, *call.arguments])
        return [name for name in names if _told(self._value(name, main), main) != _told(self._value(name, call), call)]

    def _value(self, name: str, call: Call) -> object:
        parameter = inspect.signature(self._module.forward).parameters.get(name)
        return call.arguments.get(name, None if parameter is None else parameter.default)

    def _condition(self, names: Sequence[str], call: Call) -> str:
        if not self._differing(call):
            return ""
        said = []
        for name in names:
            value = self._value(name, call)
            others_none = self._value(name, self._main.call) is None
            if name in call.extra or name.startswith("*"):
                raise ModegptError(f"it is called in more than one way, told apart by `{name}` alone")
            if value is None or isinstance(value, bool):
                said.append(f"{name} is {value}")
            elif isinstance(value, (int, float, str)):
                said.append(f"{name} == {literal(value)}")
            elif isinstance(value, Slot) and others_none:
                said.append(f"{name} is not None")
            elif _told(value, call) != _told(self._value(name, self._main.call), self._main.call):
                raise ModegptError(f"it is called in more than one way, with other kinds of `{name}`")
        return " and ".join(said)

    def _by_size(self, traced: Trace, first: _At, rest: Sequence[_At]) -> Iterator[tuple[str, Trace]]:
        """Ways that differ from `traced` in nothing but the sizes of the call."""
        ways: list[tuple[tuple[str, ...], Trace]] = []
        for at in rest:
            number = _special_number(at.call)
            if not traced.branches and number is None:
                continue
            fixed = self._traced(_with_fixed_sizes(at.call))
            size = self._size_condition(traced, first, at)
            said = tuple(one for one in (number, size) if one is not None)
            # What such a call meets, of the ways so far: the most special comes first in the written method, too.
            met = sorted((way for way in ways if set(way[0]) <= set(said)), key=lambda way: -len(way[0]))
            own, way = met[0] if met else ((), traced)
            if does_the_same(way, fixed):
                continue
            if not said or own == said:
                where = f"where {' and '.join(said)}" if said and not traced.branches else "at other sizes"
                asked = f" ({', '.join(traced.branches)})" if traced.branches else ""
                raise ModegptError(f"what it does {where} cannot be told from its trace{asked}")
            ways.append((said, self._traced(at.call)))
            _refuse_fixed(ways[-1][1])
        yield from ((" and ".join(said), way) for said, way in ways)

    def _size_condition(self, traced: Trace, first: _At, at: _At) -> str | None:
        """What tells the sizes of a call from those that were traced first."""
        tokens, batch = at.sizes[0].tokens, at.sizes[0].batch
        if tokens == 1 and self._axes.tokens is not None and first.sizes[0].tokens != 1:
            return f"{self._size(self._axes.tokens)} == 1"
        if batch == 1 and self._axes.batch is not None and first.sizes[0].batch != 1:
            return f"{self._size(self._axes.batch)} == 1"
        if self._axes.tokens is None:
            return None
        smallest, largest = range_of(traced, *self._axes.tokens)
        if tokens < smallest:
            return f"{self._size(self._axes.tokens)} < {smallest}"
        return f"{self._size(self._axes.tokens)} > {largest}" if largest is not None and tokens > largest else None

    def _traced(self, call: Call) -> Trace:
        if call.obstacle is not None:
            raise ModegptError(call.obstacle)
        return self._export(self._module, call)

    def _size(self, place: tuple[int, int]) -> str:
        index, axis = place
        name = next(name for name, value in self._main.call.arguments.items() if value == Slot(index))
        return f"{name}.size({axis})"


@dataclass(frozen=True)
class _Axes:
    """(tensor, axis) of an argument that is as long as the tokens, and of one that is as long as the batch."""

    tokens: tuple[int, int] | None
    batch: tuple[int, int] | None


def _axes(call: Call) -> _Axes:
    named = {value.index for value in call.arguments.values() if isinstance(value, Slot)}
    first, _ = SIZES
    places = [(index, axis) for index in sorted(named) for axis in call.dynamic[index]]

    def place(size: int) -> tuple[int, int] | None:
        return next((one for one in places if call.tensors[one[0]].shape[one[1]] == size), None)

    return _Axes(place(first.tokens), place(first.batch))


def _special_number(call: Call) -> str | None:
    """What tells a call whose numbers are not any; None where they are, or have no names of their own."""
    special = [(path, index) for path, index in call.numbers() if not call.dynamic[index]]
    names = [name for (name, *rest), _ in special if not rest and name not in call.extra and name[0] != "*"]
    if not special or len(names) != len(special):
        return None
    sizes = (call.tensors[index].shape[0] for _, index in special)
    return " and ".join(f"{name} == {size}" for name, size in zip(names, sizes, strict=True))


def _numbers(number: int) -> Pair:
    """Sizes at which the model is given this number, and another one."""
    return replace(SIZES[0], cached=number), replace(SIZES[1], cached=number + 1)


def _tokens(first: int, second: int) -> Pair:
    return Sizes(2, first, 0), Sizes(3, second, 0)


def _told(value: object, call: Call) -> object:
    """What tells two values of one argument apart: all but the numbers in a tensor, and its sizes."""
    leaves, structure = pytree.tree_flatten(value, is_leaf=lambda leaf: isinstance(leaf, (Slot, SizeSlot)))
    tensors = [call.tensors[leaf.index] for leaf in leaves if isinstance(leaf, Slot)]
    kinds = [(tensor.ndim, tensor.dtype) for tensor in tensors]
    return str(structure), kinds, [(type(leaf), plain(leaf)) for leaf in leaves]


def _with_fixed_sizes(call: Call) -> Call:
    return replace(call, dynamic=tuple(() for _ in call.tensors))


def _refuse_fixed(trace: Trace) -> None:
    """Raise where a size that should be any is a number in the trace."""
    if fixed_axis(trace) is not None:
        where = f" ({', '.join(trace.branches)})" if trace.branches else ""
        raise ModegptError(f"what it does is traced for one size of its inputs only{where}")
