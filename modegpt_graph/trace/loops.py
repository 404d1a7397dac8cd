"""Loops over what a mask meets are traced as if it met everything.

A mixture of experts often loops over those that a batch reached: `for expert in reached.nonzero()`, or over all, with
`if mask.any()`. How many they are depends on the data, so no graph has that loop. While `every_branch` is active, every
expert is visited, and what a mask selects is taken for at least one: the graph then shows each expert's product, and
stands for the module where all of them are reached. It cannot take the place of the module's own code, and says so.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode

Result = TypeVar("Result")
Functions = tuple[Any, ...]
_NONZERO: Functions = (torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.where)
_SAME_ROWS: Functions = (torch.squeeze, Tensor.squeeze, torch.flatten, Tensor.flatten, Tensor.view)
_SAME_ROWS += (Tensor.reshape, Tensor.__getitem__)
_PARTS: Functions = (torch.unbind, Tensor.unbind)
_SUMS: Functions = (torch.sum, Tensor.sum, torch.count_nonzero, Tensor.count_nonzero, torch.any, Tensor.any)
_BINCOUNT: Functions = (torch.bincount, Tensor.bincount)
_SAME_COUNTS: Functions = (Tensor.__getitem__, Tensor.cpu, Tensor.to, Tensor.long, Tensor.int, Tensor.detach)
_NUMBERS: Functions = (Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__index__)
_COMPARED: Mapping[Any, Callable[[int, int], bool]] = {
    function: getattr(operator, name)
    for name in ("eq", "ne", "gt", "ge", "lt", "le")
    for function in (getattr(torch, name), getattr(Tensor, name), getattr(Tensor, f"__{name}__"))
}


class _EveryBranch(TorchFunctionMode):
    def __init__(self, visited: Callable[[], None], unused: int) -> None:
        super().__init__()
        self._visited, self._unused = visited, unused
        self._places: list[tuple[Tensor, int]] = []  # non-zero places of a mask of one axis, and the size of that axis
        self._counts: list[Tensor] = []  # how much a mask meets: at least one
        self._decided: list[tuple[Tensor, bool]] = []  # what it is compared to

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given: Any = args[0] if args else None
        keywords = dict(kwargs or {})
        size = next((size for known, size in self._places if known is given), None)
        if size is not None and (func in _PARTS or func is Tensor.tolist):
            self._visited()
            listed = list(range(size - self._unused))
            rows = listed if given.ndim == 1 else [[place] for place in listed]
            return rows if func is Tensor.tolist else tuple(torch.tensor(row, device=given.device) for row in rows)
        if func is Tensor.__bool__ and (answer := self._answer(given)) is not None:
            self._visited()
            return answer
        if func in _BINCOUNT and (experts := keywords.get("minlength", 0)):
            result = one_hot(given, experts).sum(0)  # what it is where no value is larger
            self._counts.append(result)
            return result
        result = func(*args, **keywords)
        if func in _NONZERO and isinstance(given, Tensor):
            self._note(result, given)
        elif size is not None and func in _SAME_ROWS and _is_as_long(result, given):
            self._places.append((result, size))
        self._count(func, given, args, result)
        return result

    def _note(self, found: Any, mask: Tensor) -> None:
        for value in pytree.tree_leaves(found):
            if isinstance(value, Tensor) and value.ndim > 0 and not isinstance(value.shape[0], int):
                torch._check(value.shape[0] >= 1)
                if mask.ndim == 1 and isinstance(mask.shape[0], int):
                    self._places.append((value, mask.shape[0]))

    def _count(self, func: Any, given: Any, args: tuple[Any, ...], result: Any) -> None:
        is_count = any(one is given for one in self._counts)
        if func in _SUMS and isinstance(given, Tensor) and (is_count or given.dtype == torch.bool):
            self._counts.append(result)
        elif is_count and (func in _SAME_COUNTS or func in _PARTS):
            self._counts += pytree.tree_leaves(result)
        elif is_count and func in _NUMBERS:
            for number in pytree.tree_leaves(result):
                torch._check(number >= 1)
        elif is_count and func in _COMPARED and result.ndim == 0 and args[1] in (0, 1):
            answers = [_COMPARED[func](count, args[1]) for count in (1, 2)]  # that of 2 is that of all above
            if len(set(answers)) == 1:
                self._decided.append((result, answers[0]))

    def _answer(self, condition: Any) -> bool | None:
        if any(one is condition for one in self._counts):
            return True
        return next((answer for one, answer in self._decided if one is condition), None)


def _is_as_long(one: Any, other: Tensor) -> bool:
    """Whether two first axes have the same symbol for a size: no row was left out."""
    return isinstance(one, Tensor) and one.ndim > 0 and str(one.shape[0]) == str(other.shape[0])


@contextmanager
def every_branch(visited: Callable[[], None] = lambda: None, unused: int = 0) -> Iterator[None]:
    """Within this context a loop over the non-zero places of a mask visits all its places, and calls `visited`.

    unused: last places that are not visited.   Only masks of one axis, whose size is known; everything else is computed
    as it is written.
    """
    with _EveryBranch(visited, unused):
        yield


def with_places_that_are_used(attempt: Callable[[int], Result]) -> Result:
    """`attempt(0)`, or `attempt(1)` where a loop goes one too far: a mask may have a place more than there are experts.

    attempt: given how many last places are unused.
    """
    try:
        return attempt(0)
    except IndexError:
        return attempt(1)
