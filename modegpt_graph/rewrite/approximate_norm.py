"""Queries and keys under a norm: whole blocks are kept, the norm is computed on them, and the error is measured."""

from collections.abc import Callable

import torch
from torch import Tensor

from modegpt_graph.calibrate.norms import NormStatistics
from modegpt_graph.match.approximate import Norm, norms_of
from modegpt_graph.match.modules import Placed
from modegpt_graph.rewrite.solution import Solution, taken

MEASURED_RANKS = 8  # of an error curve; between them it is a straight line


class ApproximateScoreBlocks:
    """Blocks chosen as if the norm were exact; then a factor for each head, fitted to the norm on what is kept.

    With Q̂ the kept queries, each token scaled as the norm on the kept features does, the factor of a head is
    ⟨Q Kᵀ, Q̂ K̂ᵀ⟩ / ‖Q̂ K̂ᵀ‖², the least squares fit of the attention logits on the sampled tokens. Errors are measured
    with it, on the same tokens.
    """

    def __init__(self, placed: Placed, statistics: NormStatistics, choose: Callable[[int], Solution]) -> None:
        self._layout, self._choose = placed.footprint.layout, choose
        norms = norms_of(placed.footprint)
        query, key = (norms.get(role) for role in placed.footprint.outline.producers)
        self._queries = _Side(statistics.query_sample, statistics.query_summed, query)
        self._keys = _Side(statistics.key_sample, statistics.key_summed, key)
        self._total = (self._queries.gram * self._keys.gram).sum((-1, -2))  # (G, g)
        size = self._layout.size
        step = max(self._layout.block_size, size // MEASURED_RANKS)
        ranks = [
            rank for rank in range(step, size, step) if rank >= sum(kind.block_size for kind in self._layout.kinds)
        ]
        measured = [1.0, *(self.solution(rank).relative_error or 0.0 for rank in ranks), 0.0]
        self.errors = _through([0, *ranks, size], measured)

    def solution(self, rank: int) -> Solution:
        """The blocks that make up `rank` features, and the factor of each head."""
        chosen = self._choose(rank)
        kept = taken(self._layout, chosen.kept)  # (G, k)
        query, key = self._queries.kept(kept), self._keys.kept(kept)
        query_exact, key_exact = self._queries.sample_of(kept), self._keys.sample_of(kept)
        inner = (self._queries.with_(query) * self._keys.with_(key)).sum((-1, -2))  # (G, g)
        own = (_gram(query) * _gram(key)).sum((-1, -2))
        factor = inner / own.clamp_min(torch.finfo(own.dtype).tiny)
        lost = (self._total - factor * inner).clamp_min(0)
        exact = self._total - 2 * (self._queries.with_(query_exact) * self._keys.with_(key_exact)).sum((-1, -2))
        exact += (_gram(query_exact) * _gram(key_exact)).sum((-1, -2))
        total = float(self._total.sum())
        return Solution(
            chosen.kept,
            query_factor=factor,
            relative_error=float(lost.sum()) / total,
            exact_norm_error=max(float(exact.sum()), 0.0) / total,
        )


class _Side:
    """Queries or keys of the sampled tokens, with the norm on them. sample, summed: (T, G, g, d)."""

    def __init__(self, sample: Tensor, summed: Tensor | None, norm: Norm | None) -> None:
        self._sample, self._summed, self._norm = sample.double(), summed, norm
        self.gram = _gram(self._sample)

    def sample_of(self, kept: Tensor) -> Tensor:
        """(T, G, g, k) the kept features, under the exact norm."""
        return self._sample.gather(3, _index(kept, self._sample))

    def kept(self, kept: Tensor) -> Tensor:
        """(T, G, g, k) the kept features, under the norm on them alone."""
        value = self.sample_of(kept)
        if self._norm is None or self._summed is None:
            return value
        summed = self._summed.double()
        return value * self._norm.factor(summed.gather(3, _index(kept, summed))) / self._norm.factor(summed)

    def with_(self, other: Tensor) -> Tensor:
        """(G, g, d, k) products of all features with those of another value, over the tokens."""
        return torch.einsum("tghi,tghj->ghij", self._sample, other)


def _gram(value: Tensor) -> Tensor:
    return torch.einsum("tghi,tghj->ghij", value, value)


def _index(kept: Tensor, value: Tensor) -> Tensor:
    return kept[None, :, None].expand(value.shape[0], -1, value.shape[2], -1)


def _through(ranks: list[int], errors: list[float]) -> Tensor:
    """(d + 1,) straight lines through the measured points."""
    points, values = torch.tensor(ranks, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
    at = torch.arange(ranks[-1] + 1, dtype=torch.float64)
    right = torch.searchsorted(points, at).clamp(min=1)
    share = (at - points[right - 1]) / (points[right] - points[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])
