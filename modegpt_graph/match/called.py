"""How a model calls the modules of its sites, at the sizes that are traced first and at any others."""

from collections.abc import Mapping
from contextlib import suppress

from torch import nn

from modegpt_graph.match.forks import Pair
from modegpt_graph.trace.calls import SIZES, Call
from modegpt_graph.trace.numbers import record_calls_with_numbers


class Calls:
    """How a model calls its modules, at the sizes that are traced first and at others.

    Other sizes are tried for models from elsewhere: those of the library keep to what a mask and a cache tell them.
    """

    def __init__(self, skeleton: nn.Module, paths: tuple[str, ...], example_inputs: tuple | None) -> None:
        self._skeleton, self._paths, self._example_inputs = skeleton, paths, example_inputs
        self._known: dict[Pair, Mapping[str, Call]] = {
            SIZES: record_calls_with_numbers(skeleton, paths, example_inputs)
        }

    def at(self, pair: Pair) -> Mapping[str, Call]:
        """Module → how it is called; nothing where the model does not run at these sizes."""
        if pair not in self._known:
            known: Mapping[str, Call] = {}
            if self._example_inputs is not None:
                with suppress(Exception):  # the model's own code may say no to any size in any way
                    known = record_calls_with_numbers(self._skeleton, self._paths, self._example_inputs, pair)
            self._known[pair] = known
        return self._known[pair]
