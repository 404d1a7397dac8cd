"""What calibration collects at a site: Gram matrices, summed over tokens as they stream by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, fx

from modegpt_graph.errors import ModegptError, OverflowedActivations
from modegpt_graph.flow.elements import shape_of
from modegpt_graph.match.footprint import Footprint
from modegpt_graph.trace.linear import Linear
from modegpt_graph.trace.operations import Effect, effect

COLUMN_BLOCKS = 8


def exact(values: Tensor) -> Tensor:
    """In single precision at least: half would lose what is small beside the largest of a sum or a difference."""
    return values if values.dtype == torch.float64 else values.float()


class Gram:
    """Σ [X, 1]ᵀ [X, 1] in float64 over all rows added, (N + 1, N + 1).

    Only the lower block triangle is computed, which saves seven sixteenths of the multiplications.
    """

    def __init__(self, size: int) -> None:
        self.size, self.rows = size, 0
        self._lower = torch.zeros(size, size, dtype=torch.float64)
        self._sum = torch.zeros(size, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add rows. features: (…, N)."""
        features = features.reshape(-1, self.size)
        self.rows += len(features)
        step = -(-self.size // COLUMN_BLOCKS)
        for start in range(0, self.size, step):
            block = features[:, start:].T @ features[:, start : start + step]
            self._lower[start:, start : start + step] += block.double()
        self._sum += features.sum(0).double()

    def augmented(self) -> Tensor:
        """(N + 1, N + 1) of [X, 1]."""
        lower = self._lower.tril()
        full = torch.empty(self.size + 1, self.size + 1, dtype=torch.float64)
        full[:-1, :-1] = lower + lower.tril(-1).T
        full[-1, :-1] = full[:-1, -1] = self._sum
        full[-1, -1] = self.rows
        return full


@dataclass(frozen=True)
class ConsumerStatistics:
    """Gram matrix of what a refitted matrix reads: (N + 1, N + 1) of [X, 1]."""

    gram: Tensor


@dataclass(frozen=True)
class ExpertStatistics:
    """For every expert, the Gram matrix of what its refitted matrix reads.

    grams: (N + 1, N + 1) each, of [X, 1] over the tokens that were routed to the expert.
    """

    grams: tuple[Tensor, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many tokens each expert saw."""
        return tuple(int(gram[-1, -1]) for gram in self.grams)


@dataclass(frozen=True)
class ScoreStatistics:
    """Gram matrices of queries (G, g, d, d) and keys (G, d, d), after all that stands before their product."""

    queries: Tensor
    keys: Tensor


Statistics = ConsumerStatistics | ExpertStatistics | ScoreStatistics


def added(one: Statistics, other: Statistics) -> Statistics:
    """What a site has on both texts; what `other` does not have, and beyond Gram matrices, is as in `one`."""
    if isinstance(one, ConsumerStatistics) and isinstance(other, ConsumerStatistics):
        both = [field.name for field in fields(one) if hasattr(other, field.name)]
        return replace(one, **{name: getattr(one, name) + getattr(other, name) for name in both})
    if isinstance(one, ScoreStatistics) and isinstance(other, ScoreStatistics):
        return replace(one, queries=one.queries + other.queries, keys=one.keys + other.keys)
    if isinstance(one, ExpertStatistics) and isinstance(other, ExpertStatistics):
        return ExpertStatistics(tuple(a + b for a, b in zip(one.grams, other.grams, strict=True)))
    raise TypeError(f"{type(one).__name__} and {type(other).__name__} are not of one site")


class ConsumerCollector:
    """Collects at the input of the matrix that is fitted again."""

    def __init__(self, footprint: Footprint) -> None:
        (consumer,) = footprint.outline.consumers.values()
        self.nodes: Mapping[str, fx.Node] = {"input": consumer.source}
        self.readers: Mapping[str, Linear] = {"input": consumer}
        self._gram = Gram(shape_of(consumer.source)[-1])

    def add(self, name: str, value: Tensor) -> None:
        """Another batch of what the consumer reads."""
        self._gram.add(exact(value))

    def statistics(self, site: str) -> ConsumerStatistics:
        """The sums so far. Raises OverflowedActivations where they are not finite."""
        gram = self._gram.augmented()
        checked(gram, site, self._gram.rows)
        return ConsumerStatistics(gram)


class ExpertCollector:
    """Collects at the input of the matrices that are fitted again, one for each expert."""

    def __init__(self, footprint: Footprint) -> None:
        (consumer,) = footprint.outline.consumers.values()
        self.nodes: Mapping[str, fx.Node] = {"input": consumer.source}
        self.readers: Mapping[str, Linear] = {"input": consumer}
        if consumer.offsets is not None:
            self.nodes = {"offsets": consumer.offsets, **self.nodes}
        self._grams = [Gram(shape_of(consumer.source)[-1]) for _ in range(consumer.copies)]
        self._ends: list[int] | None = None

    def add(self, name: str, value: Tensor) -> None:
        """Another batch of what the consumer reads: (experts, T, N), or (T, N) after where each expert ends."""
        if name == "offsets":
            self._ends = value.tolist()
            return
        value = exact(value)
        parts = value if self._ends is None else value[: self._ends[-1]].tensor_split(self._ends[:-1])
        for gram, part in zip(self._grams, parts, strict=True):
            if len(part):
                gram.add(part)

    def statistics(self, site: str) -> ExpertStatistics:
        """The sums so far. Raises OverflowedActivations where they are not finite."""
        grams = tuple(gram.augmented() for gram in self._grams)
        for gram, own in zip(grams, self._grams, strict=True):
            checked(gram, site, own.rows)
        return ExpertStatistics(grams)


class ScoreCollector:
    """Collects at the two operands of the attention scores."""

    def __init__(self, footprint: Footprint) -> None:
        outline, layout = footprint.outline, footprint.layout
        self.readers: Mapping[str, Linear] = {}
        query, key = outline.operands
        self.nodes: Mapping[str, fx.Node] = {"query": query, "key": key}
        self._turned = effect(outline.end) is not Effect.ATTENTION
        self._columns = _columns_of(key, footprint, turned=self._turned)
        self._query_heads = _heads_of(query, footprint, self._columns, turned=False)
        self._key_heads = _heads_of(key, footprint, self._columns, turned=self._turned)[:, :1]
        groups, size = layout.groups, layout.size
        self._rows = 0
        self._queries = torch.zeros(groups, self._query_heads.shape[1], size, size, dtype=torch.float64)
        self._keys = torch.zeros(groups, 1, size, size, dtype=torch.float64)

    def add(self, name: str, value: Tensor) -> None:
        """Another batch of queries (…, H, S, d) or keys."""
        sums = self._queries if name == "query" else self._keys
        chosen = self._by_head(name, value).transpose(0, 1).flatten(1, 2)  # (G·g, B·S, d)
        chosen = exact(chosen)
        sums += (chosen.mT @ chosen).double().view_as(sums)
        if name == "query":
            self._rows += chosen.shape[1]

    def _by_head(self, name: str, value: Tensor) -> Tensor:
        """(B, G·g, S, d) queries or keys, in the order of the site's groups."""
        if name == "key" and self._turned:
            value = value.transpose(-1, -2)
        heads = self._query_heads if name == "query" else self._key_heads
        value = value.reshape(-1, int(self._heads_in(name)), *value.shape[-2:])  # (B, H, S, d)
        value = value if len(self._columns) == value.shape[-1] else value[..., self._columns]
        return value[:, heads.flatten()]

    def _heads_in(self, name: str) -> int:
        """Heads of an operand, without the batch that may be folded into the same axis."""
        node = self.nodes[name]
        first, *heads = shape_of(node)[:-2]
        return math.prod(heads) if heads else first // BATCH

    def statistics(self, site: str) -> ScoreStatistics:
        """The sums so far. Raises OverflowedActivations where they are not finite, ModegptError where nothing came."""
        if not self._rows:
            raise ModegptError(f"{site}: no query was seen while the model ran; another module takes its place")
        checked(self._queries, site, self._rows)
        checked(self._keys, site, self._rows)
        return ScoreStatistics(self._queries, self._keys[:, 0])


Collector = ConsumerCollector | ExpertCollector | ScoreCollector
BATCH = 2  # of the recorded call whose sizes the traced example has


def collector(footprint: Footprint) -> Collector:
    """The collector that fits a site."""
    if not footprint.outline.consumers:
        return ScoreCollector(footprint)
    return ConsumerCollector(footprint) if footprint.outline.experts is None else ExpertCollector(footprint)


def _fibres_of(node: fx.Node, footprint: Footprint, *, turned: bool) -> Tensor:
    """(H, d) classes of the features of an operand's heads; -1 where they come from elsewhere."""
    labels = footprint.flow.labels[node]
    assert isinstance(labels, Tensor)
    labels = labels.transpose(-1, -2) if turned else labels
    own = labels.reshape(labels.shape[0] if labels.ndim > 3 else BATCH, -1, *labels.shape[-2:])[0]  # (H, S, d)
    return footprint.flow.classes.of(own.amax(1))  # the same at all positions, but for those that are padding


def _columns_of(node: fx.Node, footprint: Footprint, *, turned: bool) -> Tensor:
    """(d,) places of the site's features along the last axis of an operand."""
    return (_fibres_of(node, footprint, turned=turned) >= 0).any(0).nonzero().flatten()


def _heads_of(node: fx.Node, footprint: Footprint, columns: Tensor, *, turned: bool) -> Tensor:
    """(G, g) which heads of an operand belong to each group."""
    first = _fibres_of(node, footprint, turned=turned)[:, columns].min(dim=1).values
    groups = [(first == int(fibre.min())).nonzero().flatten() for fibre in footprint.layout.fibres]
    return torch.stack(groups)


def checked(sums: Tensor, site: str, rows: int) -> None:
    """Raise OverflowedActivations where sums over `rows` tokens are not finite."""
    bad = int((~torch.isfinite(sums)).sum())
    if bad:
        raise OverflowedActivations(
            f"{site}: the Gram matrix has {bad:,} non-finite entries after {rows:,} tokens; "
            "the model overflows on this text"
        )
