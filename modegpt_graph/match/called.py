"""How a model calls the modules of its sites, at the sizes that are traced first and at any others."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from torch import nn

from modegpt_graph.errors import ModegptError
from modegpt_graph.match.forks import Pair
from modegpt_graph.trace.calls import SIZES, Call
from modegpt_graph.trace.counters import counted
from modegpt_graph.trace.numbers import record_calls_with_numbers


class Calls:
    """How a model calls its modules, at the sizes that are traced first and at others.

    Other sizes are tried for models from elsewhere: those of the library keep to what a mask and a cache tell them.
    """

    def __init__(self, skeleton: nn.Module, paths: tuple[str, ...], example_inputs: tuple | None) -> None:
        self._skeleton, self._paths, self._example_inputs = skeleton, paths, example_inputs
        # Modules of the library count nothing, and say in the cache what they keep.
        self._counted = () if example_inputs is None else counted(skeleton, example_inputs)
        self._batch: int | None = None  # the only one that the model takes
        self._free: frozenset[str] | None = None  # modules whose numbers may be any
        try:
            first = self._recorded(SIZES)
        except ModegptError:
            if example_inputs is None:
                raise
            self._batch = int(example_inputs[0].shape[0])
            first = self._recorded(SIZES)
        self._known: dict[Pair, Mapping[str, Call]] = {SIZES: first}
        self._free = frozenset(path for path, call in first.items() if call.also)

    def at(self, pair: Pair) -> Mapping[str, Call]:
        """Module → how it is called; nothing where the model does not run at these sizes."""
        if pair not in self._known:
            known: Mapping[str, Call] = {}
            if self._example_inputs is not None:
                with suppress(Exception):  # the model's own code may say no to any size in any way
                    known = self._recorded(pair)
            self._known[pair] = known
        return self._known[pair]

    def _recorded(self, pair: Pair) -> Mapping[str, Call]:
        sizes = (
            pair if self._batch is None else (replace(pair[0], batch=self._batch), replace(pair[1], batch=self._batch))
        )
        calls = record_calls_with_numbers(self._skeleton, self._paths, self._example_inputs, sizes, self._free)
        for path, call in calls.items():
            own = next((name for name in self._counted if not path or name.startswith(f"{path}.")), None)
            if own is not None and call.obstacle is None:
                why = f"each call changes its attribute `{own}`: keep it in a buffer, and change that in place"
                calls[path] = replace(call, obstacle=why)
        return calls
