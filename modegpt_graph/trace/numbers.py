"""Whole numbers that a model hands on to its modules: where in a cache to write. Such a number is a symbol of a trace.

That a number is handed on is seen by giving the model another. In a trace it is the size of a tensor that is there for
nothing else: sizes are symbols already.
"""

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch.utils._pytree as pytree
from torch import nn

from modegpt_graph.trace.calls import (
    SIZES,
    Call,
    Seen,
    Sizes,
    call_of,
    constants_of,
    is_leaf,
    plain,
    record_calls,
    runs_of,
)

_OTHERS = ((4, 11), (3, 6))  # tried in order: a cache may be too short for the first
_SMALL = 1  # less than what a symbol is taken for

Runs = Sequence[Mapping[str, Sequence[Seen]]]


def record_calls_with_numbers(
    skeleton: nn.Module,
    names: Iterable[str],
    example_inputs: tuple | None,
    sizes: tuple[Sizes, Sizes] = SIZES,
    free: Collection[str] | None = None,
) -> dict[str, Call]:
    """`record_calls`, where a number that the model hands on is as free as the sizes of tensors.

    free: modules of which that is known to be so; None where it is to be found out.
    The numbers are `cached` of the sizes, where these are not 0.
    """
    calls = record_calls(skeleton, names, example_inputs, sizes)
    if example_inputs is None:
        return calls
    chosen = [name for name, call in calls.items() if not call.others and (free is None or name in free)]
    if not chosen:
        return calls
    modules = {name: skeleton.get_submodule(name) for name in chosen}
    wanted, first = ((pair[0].cached, pair[1].cached) for pair in (sizes, SIZES))
    for place, usual in _numbers_of(skeleton, example_inputs):

        def runs(numbers: tuple[int, int], place: int = place) -> Runs:
            return runs_of(skeleton, modules, sizes, [_given(skeleton, example_inputs, place, n) for n in numbers])[0]

        for others in (wanted,) if all(wanted) and wanted != first else _OTHERS:
            with suppress(Exception):  # the model's own code may say no to any number in any way
                found, special = runs(others), [runs((number, number)) for number in dict.fromkeys((usual, _SMALL))]
                calls |= {name: one for name in modules if (one := _merged(name, found, special, sizes)) is not None}
                break
    return calls


def with_other_numbers(model: nn.Module, example_inputs: tuple, more: int) -> list[tuple]:
    """The example, with a number in the place of each that is so much more."""
    return [_given(model, example_inputs, place, number + more) for place, number in _numbers_of(model, example_inputs)]


def _numbers_of(model: nn.Module, example_inputs: tuple) -> Iterator[tuple[int, int]]:
    """(place among the model's arguments, value by default or in the example) of every whole number."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [one for one in inspect.signature(model.forward).parameters.values() if one.kind in kinds]
    for place, parameter in enumerate(parameters):
        value = example_inputs[place] if place < len(example_inputs) else parameter.default
        if place > 0 and type(value) is int:
            yield place, value


def _given(model: nn.Module, example_inputs: tuple, place: int, number: int) -> tuple:
    """The example with another number in one place."""
    defaults = [one.default for one in inspect.signature(model.forward).parameters.values()]
    given = [*example_inputs, *defaults[len(example_inputs) : place + 1]]
    return *given[:place], number, *given[place + 1 :]


def _merged(name: str, found: Runs, special: Sequence[Runs], sizes: tuple[Sizes, Sizes]) -> Call | None:
    """One module's call with its numbers free; None where it has none, or is called otherwise with other numbers."""
    if any(len(set(map(constants_of, run.get(name, ())))) != 1 for runs in (found, *special) for run in runs):
        return None
    first, second = (run[name][0] for run in found)
    usual = special[0][0][name][0]
    leaves, structure = pytree.tree_flatten(first.arguments, is_leaf=is_leaf)
    others = [run[name][0] for runs in (found, *special) for run in runs]
    if any(pytree.tree_flatten(one.arguments, is_leaf=is_leaf)[1] != structure for one in others):
        return None
    again = pytree.tree_leaves(second.arguments, is_leaf=is_leaf)
    places = [place for place, pair in enumerate(zip(leaves, again, strict=True)) if _is_number(*pair)]
    for one in others:
        said = pytree.tree_leaves(one.arguments, is_leaf=is_leaf)
        if any(
            type(a) is not type(b) or (p not in places and plain(a) != plain(b))
            for p, (a, b) in enumerate(zip(leaves, said, strict=True))
        ):
            return None
    if not places and [t.shape for t in first.tensors] == [t.shape for t in usual.tensors]:
        return None
    main, *also = (call_of(runs[0][name][0], runs[1][name][0], sizes, places) for runs in (found, *special))
    if any(call.obstacle is not None for call in (main, *also)):
        return None
    return replace(main, only_as_seen=True, also=tuple(replace(one, only_as_seen=True) for one in also))


def _is_number(one: object, other: object) -> bool:
    return type(one) is int and type(other) is int and one != other
