"""Type I: keep intermediate features and refit the matrix that consumes them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modegpt_graph.decompose.elimination import Elimination, eliminate
from modegpt_graph.decompose.numerics import (
    RankError,
    check_finite,
    check_gram,
    check_rank,
    energy,
    factorise,
    mean_diagonal,
    ratio_of,
)

Selection = Literal["leverage", "surgeon", "energy", "magnitude"]


@dataclass(frozen=True)
class Nystrom:
    """Kept features and the refitted consumer.

    kept: (rank,) columns, ascending.   down: (rank, D) float64.   bias: (D,) or None.
    relative_error: ‖Z W + b − Z_S Ŵ − b̂‖² / ‖Z W + b‖² over the calibration tokens.
    ridge: the ridge that was used, relative to the mean diagonal: larger than the one asked for where the Gram matrix
    was singular.
    """

    kept: Tensor
    down: Tensor
    bias: Tensor | None
    relative_error: float
    ridge: float


@dataclass(frozen=True)
class Consumer:
    """A consumer as least squares sees it: a constant column is projected out, which centres the Gram matrix.

    gram: (N, N), centred where there is a bias.   mean: (N,) feature means, None without bias.   total: ‖Z W + b‖².
    """

    gram: Tensor
    mean: Tensor | None
    weight: Tensor
    bias: Tensor | None
    total: float


def consumer(gram: Tensor, weight: Tensor, bias: Tensor | None = None) -> Consumer:
    """Prepare (gram, weight, bias); a Gram matrix of [Z, 1] is needed for a bias, and reduced to that of Z without one.

    gram: (N, N) = Zᵀ Z or (N + 1, N + 1) = [Z, 1]ᵀ [Z, 1].   weight: (N, D).   bias: (D,).
    Raises NumericalError where entries are not finite.
    """
    gram, weight = check_gram(gram), weight.double()
    check_finite(weight, "weight")
    features = weight.shape[0]
    augmented = gram.shape[0] == features + 1
    if not augmented and gram.shape[0] != features:
        raise ValueError(f"gram {tuple(gram.shape)} fits no weight {tuple(weight.shape)}: it needs N or N + 1 rows")
    if bias is None:
        gram = gram[:features, :features]
        return Consumer(gram, None, weight, None, float(energy(gram, weight)))
    if not augmented:
        raise ValueError(
            "a bias is refitted from the Gram matrix of [Z, 1]: one more row and column than the weight has"
        )
    bias = bias.double()
    total = float(energy(gram, torch.cat([weight, bias[None]])))
    tokens = gram[-1, -1]
    mean = gram[:features, -1] / tokens if tokens > 0 else torch.zeros_like(gram[:features, -1])
    centred = gram[:features, :features] - tokens * torch.outer(mean, mean)
    return Consumer((centred + centred.mT) / 2, mean, weight, bias, total)


def leverage_scores(gram: Tensor, ridge: float) -> Tensor:
    """s_i = [C (C + λI)⁻¹]_ii, how much of feature i no other feature can stand in for; each in 0..1.

    gram: (N, N).   ridge: λ relative to the mean diagonal.   Returns (N,).
    Source: MoDeGPT (arXiv 2408.09632), algorithm 1; ridge leverage scores: Musco and Musco (arXiv 1605.07583).
    """
    factor = factorise(check_gram(gram), ridge)
    return (1 - factor.ridge * torch.cholesky_inverse(factor.lower).diagonal()).clamp(0, 1)


def surgeon_order(
    gram: Tensor, down: Tensor, *, ridge: float, bias: Tensor | None = None, blocks: Tensor | None = None
) -> Elimination:
    """The order of dropping features that costs least after the refit, with the error at every rank.

    Arguments as in `nystrom`; one call serves every rank: `nystrom(…, kept=…)` refits for one of them.
    """
    problem = consumer(gram, down, bias)
    return eliminate(problem.gram, problem.weight, ridge=ridge, blocks=blocks, total=problem.total)


def selection_order(
    gram: Tensor,
    down: Tensor,
    selection: Selection,
    *,
    ridge: float,
    leverage_ridge: float = 1.0,
    bias: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """(n,) blocks in the order in which `selection` drops them, the least important first.

    leverage: ridge leverage scores of the features themselves, the paper's choice, blind to the consumer.
    surgeon: error after the refit.   energy: ‖z_i‖²‖W_i‖², error without a refit.   magnitude: ‖W_i‖², blind to the
    data.
    """
    if selection == "surgeon":
        return surgeon_order(gram, down, ridge=ridge, bias=bias, blocks=blocks).order
    features = check_gram(gram)[: down.shape[0], : down.shape[0]]
    if selection == "leverage":
        scores = leverage_scores(features, leverage_ridge)
    elif selection == "energy":
        scores = features.diagonal() * down.double().square().sum(1)
    elif selection == "magnitude":
        scores = down.double().square().sum(1)
    else:
        raise ValueError(f"unknown selection {selection!r}: leverage, surgeon, energy or magnitude")
    return (scores if blocks is None else scores[blocks].sum(1)).argsort(stable=True)


def nystrom(
    gram: Tensor,
    down: Tensor,
    rank: int,
    *,
    ridge: float,
    selection: Selection = "leverage",
    leverage_ridge: float = 1.0,
    bias: Tensor | None = None,
    blocks: Tensor | None = None,
    kept: Tensor | None = None,
) -> Nystrom:
    """Keep `rank` intermediate features and refit `down` so that Z·down is matched best on the calibration set.

    gram: (N, N) float64, Zᵀ Z over calibration tokens, or (N + 1, N + 1) of [Z, 1], which a `bias` (D,) needs: the
    constant is always kept and the bias refitted.   down: (N, D).   blocks: (n, b) columns that stay or go together.
    kept: this choice instead of `selection`.   The ridge (relative to the mean diagonal) pulls Ŵ towards the rows of
    `down`, not to zero: Ŵ = W_S + (C_SS + λI)⁻¹ C_SR W_R, so that full rank changes nothing.
    Raises RankError where `rank` is not in 1..N or splits a block, NumericalError for a Gram matrix that is none.
    Source: MoDeGPT (arXiv 2408.09632), algorithm 1 and theorem 1.
    """
    features = down.shape[0]
    check_rank(rank, features)
    size = 1 if blocks is None else blocks.shape[1]
    if rank % size:
        raise RankError(f"rank {rank} splits blocks of {size} columns")
    if kept is None:
        order = selection_order(
            gram, down, selection, ridge=ridge, leverage_ridge=leverage_ridge, bias=bias, blocks=blocks
        )
        chosen = order[len(order) - rank // size :]
        kept = chosen if blocks is None else blocks[chosen].flatten()
    if len(kept) != rank or len(kept.unique()) != rank:
        raise RankError(f"kept names {len(kept.unique())} different columns where rank is {rank}")
    return refit_rows(consumer(gram, down, bias), kept.sort().values, ridge)


def refit_rows(problem: Consumer, kept: Tensor, ridge: float) -> Nystrom:
    """`nystrom` for a choice that is made, `kept` ascending; one `consumer(…)` serves every choice."""
    gram, weight = problem.gram, problem.weight
    dropped = torch.ones(len(weight), dtype=torch.bool)
    dropped[kept] = False
    unit = mean_diagonal(gram)
    factor = factorise(gram[kept][:, kept], ridge, unit=unit)
    lost = weight[dropped]
    correction = torch.cholesky_solve(gram[kept][:, dropped] @ lost, factor.lower)
    # The difference W − Ŵ is −correction on the kept rows and W itself on the dropped ones.
    difference = torch.empty_like(weight)
    difference[kept], difference[dropped] = -correction, lost
    error = ratio_of(float(energy(gram, difference)), problem.total)
    bias = problem.bias
    if bias is not None and problem.mean is not None:
        bias = bias + problem.mean @ difference
    return Nystrom(kept, weight[kept] + correction, bias, error, factor.ridge / unit)
