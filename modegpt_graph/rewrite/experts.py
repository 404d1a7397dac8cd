"""Experts whose matrices lie in one tensor: solved one by one, at one rank, each from the tokens that it saw."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from modegpt_graph.decompose.numerics import ratio_of
from modegpt_graph.rewrite.bounds import Bounds, ExpertBounds
from modegpt_graph.rewrite.shrunk import ShrunkSolver
from modegpt_graph.rewrite.solution import ExpertFit, Solution


class ExpertsSolver:
    """All experts of one tensor. They keep the same number of features, so that the tensor stays regular; which ones
    differs.

    errors: (N + 1,) of what all experts put out, summed over all their tokens, as their solvers suppose it.
    """

    def __init__(self, experts: Sequence[ShrunkSolver], tokens: Sequence[int]) -> None:
        """tokens: how many each expert saw."""
        self._experts, self._tokens = experts, tokens
        self._sizes = [one.seen.size for one in experts]
        sizes = torch.tensor(self._sizes, dtype=torch.float64)
        self._shares = sizes / sizes.sum() if float(sizes.sum()) > 0 else torch.full_like(sizes, 1 / len(sizes))
        self.errors = sum(
            (share * one.errors for share, one in zip(self._shares, experts, strict=True)),
            torch.zeros_like(experts[0].errors),
        )

    def bounds(self) -> Bounds | None:
        """Those of every expert, over the tokens that it saw."""
        bounds = tuple(filter(None, (one.bounds() for one in self._experts)))
        return ExpertBounds(bounds, self._shares) if len(bounds) == len(self._experts) else None

    def solution(self, rank: int) -> Solution:
        """`rank` features of every expert."""
        found = [one.solution(rank) for one in self._experts]
        errors = [one.relative_error or 0.0 for one in found]
        fits = tuple(
            ExpertFit(error if tokens else None, tokens) for error, tokens in zip(errors, self._tokens, strict=True)
        )
        lost = sum(error * size for error, size in zip(errors, self._sizes, strict=True))
        return replace(_stacked(found), relative_error=ratio_of(lost, sum(self._sizes)), experts=fits)


def _stacked(found: list[Solution]) -> Solution:
    """The solutions of single experts as one: each is a group."""
    first = found[0]
    kept = tuple(torch.cat([one.kept[kind] for one in found]) for kind in range(len(first.kept)))
    maps = {role: torch.cat([one.maps[role] for one in found]) for role in first.maps}
    refits = {}
    for role in first.refits:
        weights, biases = zip(*(one.refits[role] for one in found), strict=True)
        refits[role] = torch.cat(weights), torch.stack(biases) if biases[0] is not None else None
    return Solution(kept, maps, refits)
