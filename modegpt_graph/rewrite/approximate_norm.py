"""Queries and keys under a norm: whole blocks are kept, the norm is computed on them, and the error is measured.

What is dropped is missing from the norm's sum. Two things make up for it. Kept features get scales before the norm, so
that their squares weigh as much as it takes to predict the whole sum; and queries get factors after it, which undo the
scales and bring the attention logits of each head to the size that fits best.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modegpt_graph.calibrate.norms import NormStatistics
from modegpt_graph.decompose.nonnegative import nonnegative
from modegpt_graph.match.approximate import Norm, norms_of
from modegpt_graph.match.site_module import Placed
from modegpt_graph.rewrite.solution import Solution, blocks_of, taken

MEASURED_RANKS = 8  # of an error curve; between them it is a straight line
RIDGE = 1e-2  # of the weights of squares, towards equal ones
LEAST_WEIGHT = 1e-3  # over that of equal ones: a scale is divided by again


class ApproximateScoreBlocks:
    """Blocks chosen as if the norm were exact; then scales and factors, fitted to the norm on what is kept.

    With Q̂ and K̂ the kept queries and keys, each token scaled as the norm on its weighed kept features does, the factor
    of a head is ⟨Q Kᵀ, Q̂ K̂ᵀ⟩ / ‖Q̂ K̂ᵀ‖², the least squares fit of the attention logits on the sampled tokens. Errors are
    measured with it, on the same tokens.
    """

    def __init__(self, placed: Placed, statistics: NormStatistics, choose: Callable[[int], Solution]) -> None:
        self._layout, self._choose = placed.footprint.layout, choose
        self._roles = tuple(placed.footprint.outline.producers)
        norms = norms_of(placed.footprint)
        query, key = (norms.get(role) for role in self._roles)
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

    def bounds(self) -> None:
        """None: no proposition speaks of a norm that does not know what was dropped."""
        return None

    def solution(self, rank: int) -> Solution:
        """The blocks that make up `rank` features, their scales, and the factors of each head."""
        chosen = self._choose(rank)
        kept = taken(self._layout, chosen.kept)  # (G, k)
        blocks = blocks_of(self._layout, [one.shape[1] for one in chosen.kept])  # (G, k)
        scales = [side.scales(kept, blocks) for side in (self._queries, self._keys)]
        query, key = self._queries.kept(kept, scales[0]), self._keys.kept(kept, scales[1])
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
            {role: _scaling(self._layout.size, kept, own) for role, own in zip(self._roles, scales, strict=True)},
            query_factor=factor[..., None] / (scales[0] * scales[1]),
            relative_error=float(lost.sum()) / total,
            exact_norm_error=max(float(exact.sum()), 0.0) / total,
        )


class _Side:
    """Queries or keys of the sampled tokens, with the norm on them. sample, summed: (T, G, g, d)."""

    def __init__(self, sample: Tensor, summed: Tensor | None, norm: Norm | None) -> None:
        self._sample, self._norm = sample.double(), norm
        self._summed = None if summed is None else summed.double()
        self.gram = _gram(self._sample)

    def sample_of(self, kept: Tensor) -> Tensor:
        """(T, G, g, k) the kept features, under the exact norm."""
        return self._sample.gather(3, _index(kept, self._sample))

    def scales(self, kept: Tensor, blocks: Tensor) -> Tensor:
        """(G, g, k) what each kept feature is multiplied by before the norm: the same for all of a block.

        The squares of the scales are the weights w ≥ 0 with which Σ w_i x_i² over the kept features comes nearest to
        the sum that the norm takes over all of them, in the least squares of the share that is missing. Ones where
        the norm is of a form that does not allow for them.
        """
        if self._norm is None or self._summed is None or self._norm.degree is None:
            return torch.ones(*self._sample.shape[1:3], kept.shape[1], dtype=torch.float64)
        squares = self._summed.square() if self._norm.degree == 1 else self._summed
        sums = squares.sum(3, keepdim=True)
        shares = squares.gather(3, _index(kept, squares)) / sums.clamp_min(torch.finfo(sums.dtype).tiny)
        size = int(blocks.max()) + 1
        by_block = shares.new_zeros(*shares.shape[:3], size).scatter_add_(3, _index(blocks, shares), shares)
        form = _gram(by_block)  # (G, g, n, n)
        right = by_block.sum(0)  # (G, g, n)
        equal = right.sum(-1, keepdim=True) / form.sum((-1, -2))[..., None].clamp_min(torch.finfo(form.dtype).tiny)
        ridge = RIDGE * form.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        form = form + torch.diag_embed(ridge.expand_as(right))
        weights = nonnegative(form, right + ridge * equal, equal.expand_as(right))
        weights = torch.maximum(weights, LEAST_WEIGHT * equal)
        return self._norm.level(kept.shape[1], squares.shape[3]) * weights.gather(2, _of_heads(blocks, weights)).sqrt()

    def kept(self, kept: Tensor, scales: Tensor) -> Tensor:
        """(T, G, g, k) the kept features, under the norm on them alone, with their scales undone after it."""
        value = self.sample_of(kept)
        if self._norm is None or self._summed is None:
            return value
        weighed = self._summed.gather(3, _index(kept, self._summed)) * scales ** (self._norm.degree or 1)
        return value * self._norm.factor(weighed) / self._norm.factor(self._summed)

    def with_(self, other: Tensor) -> Tensor:
        """(G, g, d, k) products of all features with those of another value, over the tokens."""
        return torch.einsum("tghi,tghj->ghij", self._sample, other)


def _gram(value: Tensor) -> Tensor:
    return torch.einsum("tghi,tghj->ghij", value, value)


def _index(kept: Tensor, value: Tensor) -> Tensor:
    return kept[None, :, None].expand(value.shape[0], -1, value.shape[2], -1)


def _of_heads(blocks: Tensor, value: Tensor) -> Tensor:
    return blocks[:, None].expand(-1, value.shape[1], -1)


def _scaling(size: int, kept: Tensor, scales: Tensor) -> Tensor:
    """(G, g, d, k) the map that keeps features and multiplies them by their scales."""
    groups, heads, count = scales.shape
    mapped = torch.zeros(groups, heads, size, count, dtype=torch.float64)
    return mapped.scatter_(2, kept[:, None, None].expand(-1, heads, 1, -1), scales[:, :, None])


def _through(ranks: list[int], errors: list[float]) -> Tensor:
    """(d + 1,) straight lines through the measured points."""
    points, values = torch.tensor(ranks, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
    at = torch.arange(ranks[-1] + 1, dtype=torch.float64)
    right = torch.searchsorted(points, at).clamp(min=1)
    share = (at - points[right - 1]) / (points[right] - points[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])
