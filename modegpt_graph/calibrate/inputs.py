"""What calibration collects besides, where algorithm 3 of the paper is asked for: what the value projection reads."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from modegpt_graph.calibrate.statistics import ConsumerCollector, ConsumerStatistics, Gram, checked
from modegpt_graph.flow.elements import shape_of
from modegpt_graph.match.footprint import Footprint
from modegpt_graph.trace.linear import Linear


@dataclass(frozen=True)
class ValueStatistics(ConsumerStatistics):
    """gram: of what the output matrix reads.   inputs: (D + 1, D + 1) of [X, 1], X what the value projection reads."""

    inputs: Tensor


class ValueCollector(ConsumerCollector):
    """Collects at the inputs of both matrices of a pair."""

    def __init__(self, footprint: Footprint) -> None:
        super().__init__(footprint)
        (producer,) = footprint.outline.producers.values()
        self.nodes: Mapping[str, fx.Node] = {**self.nodes, "read": producer.source}
        self.readers: Mapping[str, Linear] = {**self.readers, "read": producer}
        self._inputs = Gram(shape_of(producer.source)[-1])

    def add(self, name: str, value: Tensor) -> None:
        """Another batch of what one of the matrices reads."""
        if name == "read":
            self._inputs.add(value.float() if value.itemsize < 4 else value)
        else:
            super().add(name, value)

    def statistics(self, site: str) -> ValueStatistics:
        """The sums so far. Raises OverflowedActivations where they are not finite."""
        inputs = self._inputs.augmented()
        checked(inputs, site, self._inputs.rows)
        return ValueStatistics(super().statistics(site).gram, inputs)


def reads_one_value(footprint: Footprint) -> bool:
    """Whether a pair is one value projection and one output matrix, with heads that share no value with another."""
    producers, consumers = footprint.outline.producers, footprint.outline.consumers
    if len(producers) != 1 or len(consumers) != 1 or footprint.outline.experts is not None:
        return False
    (role,) = producers
    return footprint.layout.members[role].shape[1] == 1
