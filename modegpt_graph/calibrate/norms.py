"""What calibration collects where a norm on queries or keys is approximated: Gram matrices, and some tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from modegpt_graph.calibrate.statistics import ScoreCollector, ScoreStatistics
from modegpt_graph.flow.elements import varying_axes
from modegpt_graph.match.approximate import norms_of
from modegpt_graph.match.footprint import Footprint

TOKENS_OF_A_BATCH = 128  # kept of every batch, spread over it: all of a short text, about a thousand of a usual one


@dataclass(frozen=True)
class NormStatistics(ScoreStatistics):
    """Gram matrices of queries and keys, and a sample of T tokens of them.

    query_sample: (T, G, g, d).   key_sample: (T, G, 1, d).   query_summed, key_summed: of the same shapes, the elements
    that the norm sums; None on a side without a norm.
    """

    query_sample: Tensor
    key_sample: Tensor
    query_summed: Tensor | None
    key_summed: Tensor | None


class NormCollector(ScoreCollector):
    """Collects at the two operands of the attention scores, and where their norms sum."""

    def __init__(self, footprint: Footprint) -> None:
        super().__init__(footprint)
        norms = norms_of(footprint)
        self._summed = {
            f"{name} norm": (role, norms[role].summed)
            for name, role in zip(("query", "key"), footprint.outline.producers, strict=True)
            if role in norms
        }
        self._footprint = footprint
        self._samples: dict[str, list[Tensor]] = {}
        self.nodes: Mapping[str, fx.Node] = {**self.nodes, **{name: node for name, (_, node) in self._summed.items()}}

    def add(self, name: str, value: Tensor) -> None:
        """Another batch of queries (…, H, S, d), of keys, or of what a norm sums."""
        if name in self._summed:
            tokens = self._by_feature(value, *self._summed[name])
        else:
            super().add(name, value)
            heads = self._query_heads if name == "query" else self._key_heads
            tokens = self._by_head(name, value).transpose(1, 2).flatten(0, 1).unflatten(1, heads.shape)
        step = max(1, len(tokens) // TOKENS_OF_A_BATCH)
        self._samples.setdefault(name, []).append(tokens[::step].float())

    def _by_feature(self, value: Tensor, role: str, node: fx.Node) -> Tensor:
        """(T, G, g, d) of a value whose last axis holds the features of a head."""
        labels = self._footprint.flow.labels[node]
        assert isinstance(labels, Tensor)
        heads = [axis for axis in varying_axes(labels) if axis != labels.ndim - 1]
        if heads:
            value, labels = value.movedim(heads[0], -2), labels.movedim(heads[0], -2)
            value, labels = value.flatten(-2), labels.flatten(-2)
        members = self._footprint.members[role]
        first, order = labels.reshape(-1, labels.shape[-1])[0].sort()
        places = order[torch.searchsorted(first, members.flatten())]
        return value.reshape(-1, value.shape[-1])[:, places].unflatten(1, members.shape)

    def statistics(self, site: str) -> NormStatistics:
        """The sums and tokens so far. Raises as ScoreCollector does."""
        sums = super().statistics(site)
        samples = {name: torch.cat(parts) for name, parts in self._samples.items()}
        return NormStatistics(
            sums.queries,
            sums.keys,
            samples["query"],
            samples["key"],
            samples.get("query norm"),
            samples.get("key norm"),
        )
