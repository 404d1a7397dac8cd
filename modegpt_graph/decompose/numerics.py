"""Float64 linear algebra on Gram matrices that either holds or says what is wrong: no pinv, no unguarded inverse."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modegpt_graph.errors import InputError, ModegptError

EPSILON = torch.finfo(torch.float64).eps
FIRST_ESCALATED_RIDGE = 1e-12
LARGEST_RIDGE = 1.0


class NumericalError(ModegptError):
    """Statistics that no decomposition can use: entries that are not finite, a Gram matrix that is none."""


class RankError(InputError):
    """A rank outside of what the matrices have."""


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of gram + ridge·I.

    lower: (..., n, n).   ridge: the absolute ridge that was added.
    """

    lower: Tensor
    ridge: float


def check_finite(values: Tensor, name: str) -> None:
    """Raise NumericalError that counts the entries of `values` which are not finite."""
    if values.numel() and not all(map(math.isfinite, _extremes(values))):
        broken = int((~torch.isfinite(values)).sum())
        raise NumericalError(
            f"{name} has {broken:,} non-finite entries of {values.numel():,}; "
            "the model overflows in this dtype on this text; try --dtype float32"
        )


def _extremes(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest, which are NaN where any is: one pass over the memory."""
    low, high = values.aminmax()
    return float(low), float(high)


def check_gram(gram: Tensor, name: str = "gram") -> Tensor:
    """`gram` in float64, exactly symmetric, after proof that it can be a Gram matrix.

    gram: (..., n, n).   Raises NumericalError for entries that are not finite, asymmetry beyond rounding (1e-6 of the
    largest entry, which statistics summed in float32 still meet), or a negative diagonal.
    """
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"{name} must be (..., n, n), not {tuple(gram.shape)}")
    gram = gram.double()
    check_finite(gram, name)
    if not gram.numel():
        return gram
    largest = max(map(abs, _extremes(gram)))
    asymmetry = 0.0 if torch.equal(gram, gram.mT) else float((gram - gram.mT).abs().max())
    if asymmetry > 1e-6 * largest:
        raise NumericalError(
            f"{name} is not symmetric: entries differ by {asymmetry:.1e} where the largest is {largest:.1e}"
        )
    lowest = float(gram.diagonal(dim1=-2, dim2=-1).min())
    if lowest < -1e-9 * largest:
        raise NumericalError(f"{name} has a negative diagonal entry ({lowest:.1e}): it is no Gram matrix")
    return gram if asymmetry == 0.0 else (gram + gram.mT) / 2


def check_rank(rank: int, full_rank: int, what: str = "rank") -> None:
    """Raise RankError where `rank` is not in 1..full_rank."""
    if not 1 <= rank <= full_rank:
        raise RankError(f"{what} {rank} is not in 1..{full_rank}")


def mean_diagonal(gram: Tensor) -> float:
    """Mean of the diagonal, the unit of every relative ridge; 1 where all is zero (an expert that was never used)."""
    mean = float(gram.diagonal(dim1=-2, dim2=-1).mean()) if gram.numel() else 0.0
    return mean if mean > 0 else 1.0


def factorise(gram: Tensor, ridge: float, name: str = "gram", unit: float | None = None) -> Factor:
    """Cholesky factor of gram + ridge·I, with a ridge raised tenfold until the factor is numerically sound.

    gram: (..., n, n) float64 symmetric.   ridge: relative to `unit`, which is the mean diagonal unless it is given.
    Sound means that no column is explained by those before it up to rounding, so that solves keep about half the
    digits.
    Raises NumericalError where a ridge as large as the mean diagonal does not suffice.
    """
    unit = mean_diagonal(gram) if unit is None else unit
    limit = 10 * max(gram.shape[-1], 1) * EPSILON
    relative = ridge
    while True:
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(relative * unit)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if not bool(failed.any()):
            pivots = lower.diagonal(dim1=-2, dim2=-1).square()
            if bool((pivots > limit * shifted.diagonal(dim1=-2, dim2=-1)).all()):
                return Factor(lower, relative * unit)
        following = max(relative * 10, FIRST_ESCALATED_RIDGE)
        if following > LARGEST_RIDGE * 1.01:
            raise NumericalError(f"{name} stays singular with a ridge of {relative:g} × its mean diagonal")
        relative = following


def ridge_solve(gram: Tensor, right: Tensor, ridge: float, name: str = "gram") -> Tensor:
    """(gram + ridge·mean diagonal·I)⁻¹ right, by Cholesky; the ridge rises where the Gram matrix is singular."""
    return torch.cholesky_solve(right, factorise(gram, ridge, name).lower)


def square_root(gram: Tensor) -> Tensor:
    """The symmetric positive semi-definite R with R·R = gram; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def inverse_square_root(gram: Tensor, ridge: float = 1e-10) -> Tensor:
    """(gram + ridge·mean diagonal·I)^(-1/2) by eigh; the ridge keeps directions that were never seen bounded."""
    values, vectors = torch.linalg.eigh(gram)
    unit = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    floor = max(ridge, gram.shape[-1] * EPSILON) * unit
    return (vectors * (values.clamp_min(0) + floor).rsqrt().unsqueeze(-2)) @ vectors.mT


def energy(gram: Tensor, weight: Tensor) -> Tensor:
    """‖X·weight‖²_F from gram = Xᵀ X, over the last two axes: the (exact) size of an output or of an error."""
    return ((gram @ weight) * weight).sum(dim=(-2, -1)).clamp_min(0)


def ratio_of(error: float, total: float) -> float:
    """error / total, and 0 where nothing was there to lose."""
    return max(error, 0.0) / total if total > 0 else 0.0
