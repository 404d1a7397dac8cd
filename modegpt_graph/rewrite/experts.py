"""Experts whose matrices lie in one tensor: solved one by one, at one rank, each from the tokens that it saw."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from modegpt_graph.decompose.numerics import energy, ratio_of
from modegpt_graph.rewrite.bounds import Bounds, ExpertBounds
from modegpt_graph.rewrite.solution import ExpertFit, Solution


class ExpertSolver(Protocol):
    """What is known of one expert before its rank is: a solver like that of any site."""

    errors: Tensor

    def solution(self, rank: int) -> Solution:
        """The expert's matrices at `rank` features."""
        ...

    def bounds(self) -> Bounds | None:
        """What its errors can be at most."""
        ...


@dataclass(frozen=True)
class Expert:
    """One expert's consumer as its calibration tokens saw it, and what solves it.

    gram: (N, N) over the tokens that were routed to it, or (N + 1, N + 1) of [X, 1] where there is a bias.
    weight: (N, D).   bias: (D,) or None.   solver: finds solutions, from a Gram matrix that was shrunk.
    tokens: how many it saw.
    """

    gram: Tensor
    weight: Tensor
    bias: Tensor | None
    solver: ExpertSolver
    tokens: int


class ExpertsSolver:
    """All experts of one tensor. They keep the same number of features, so that the tensor stays regular; which ones
    differs.

    errors: (N + 1,) of what all experts put out, summed over all their tokens, as their solvers expect it.
    """

    def __init__(self, experts: list[Expert]) -> None:
        self._experts = experts
        sizes = torch.tensor([_size(one) for one in experts], dtype=torch.float64)
        self._shares = sizes / sizes.sum() if float(sizes.sum()) > 0 else torch.full_like(sizes, 1 / len(sizes))
        self.errors = sum(
            (share * one.solver.errors for share, one in zip(self._shares, experts, strict=True)),
            torch.zeros_like(experts[0].solver.errors),
        )

    def bounds(self) -> Bounds | None:
        """Those of every expert, over the tokens that it saw."""
        bounds = tuple(filter(None, (one.solver.bounds() for one in self._experts)))
        if len(bounds) < len(self._experts):
            return None
        return ExpertBounds(
            bounds,
            tuple(float(_energy(replace(one, gram=shrunk(one.gram)), one.weight, one.bias)) for one in self._experts),
            tuple(share_left(one.gram) for one in self._experts),
            tuple(_size(one) for one in self._experts),
            self._shares,
        )

    def solution(self, rank: int) -> Solution:
        """`rank` features of every expert."""
        found = [one.solver.solution(rank) for one in self._experts]
        lost = [_lost(one, solution) for one, solution in zip(self._experts, found, strict=True)]
        sizes = [_size(one) for one in self._experts]
        fits = tuple(
            ExpertFit(ratio_of(error, size) if one.tokens else None, one.tokens)
            for one, error, size in zip(self._experts, lost, sizes, strict=True)
        )
        return replace(_stacked(found), relative_error=ratio_of(sum(lost), sum(sizes)), experts=fits)


def shrunk(gram: Tensor) -> Tensor:
    """(1 − ρ) C + ρ diag(C): products of different features, drawn towards zero as far as chance explains them.

    gram: (N + 1, N + 1) of [X, 1]; C is its centred part.   With few tokens the products of features are mostly chance,
    and a refit would follow them. ρ has the least expected squared error for Gaussian features: an expert that saw many
    tokens keeps its matrix, one that saw none is given features of equal size that have nothing to do with each other.
    Source: Schäfer and Strimmer (2005), a shrinkage approach to large-scale covariance matrix estimation, target D.
    """
    if not float(gram[-1, -1]):
        return torch.eye(len(gram), dtype=gram.dtype)
    centred = _centred(gram)
    result = gram.clone()
    result[:-1, :-1] -= shrinkage(gram) * (centred - torch.diag(centred.diagonal()))
    return result


def shrinkage(gram: Tensor) -> float:
    """ρ of `shrunk`; 1 where no token was seen."""
    tokens = float(gram[-1, -1])
    if not tokens:
        return 1.0
    centred = _centred(gram)
    diagonal = centred.diagonal().clamp_min(0)
    products = float(centred.square().sum() - centred.diagonal().square().sum())
    chance = float(diagonal.sum().square() - diagonal.square().sum()) + products
    return min(1.0, chance / (tokens * products)) if products > 0 else 0.0


def share_left(gram: Tensor) -> float:
    """An s with `shrunk(gram)` ≥ s · gram, as quadratic forms: what an error is there, it is at most 1/s times here.

    With R the correlations, D the diagonal of the centred C: C ≤ ‖R‖_F D, so (1 − ρ) C + ρ D ≥ (1 − ρ + ρ/‖R‖_F) C.
    0 where no token was seen.
    """
    if not float(gram[-1, -1]):
        return 0.0
    centred, share = _centred(gram), shrinkage(gram)
    scale = centred.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    correlated = float((centred * scale[:, None] * scale).square().sum().sqrt())
    return 1 - share + share / max(correlated, 1.0)


def _centred(gram: Tensor) -> Tensor:
    mean = gram[:-1, -1] / gram[-1, -1]
    return gram[:-1, :-1] - gram[-1, -1] * torch.outer(mean, mean)


def _size(one: Expert) -> float:
    """‖X W + b‖² over the expert's tokens."""
    return float(_energy(one, one.weight, one.bias))


def _lost(one: Expert, found: Solution) -> float:
    """‖X W + b − X_S Ŵ − b̂‖² over the expert's tokens."""
    ((rows, bias),) = found.refits.values()
    (kept,) = found.kept
    if found.maps:
        (basis,) = {id(mapped): mapped for mapped in found.maps.values()}.values()
        spread = basis[0, 0] @ rows[0, 0]
    else:
        spread = torch.zeros_like(one.weight)
        spread[kept[0]] = rows[0, 0]
    change = None if one.bias is None or bias is None else one.bias - bias
    return float(_energy(one, one.weight - spread, change))


def _energy(one: Expert, weight: Tensor, bias: Tensor | None) -> Tensor:
    return energy(one.gram, weight if bias is None else torch.cat([weight, bias[None]]))


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
