"""The change of a matrix that takes away what is left of an error, held back as far as held-out rows ask for."""

import torch
from torch import Tensor

from modegpt_graph.decompose.numerics import check_finite, check_gram, factorise

SMALLEST_SPREAD = 1e-9  # of a feature's size: a spread around its mean below that is rounding


def correction(gram: Tensor, pull: Tensor, *, ridge: float, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The Δ (K, D) and δ (D,) that minimise ‖R − F Δ − δ‖² + λ Σ_k ‖F_k‖² ‖Δ_k‖²; δ is None without a bias.

    gram: (K + 1, K + 1) = [F, 1]ᵀ[F, 1].   pull: (K + 1, D) = [F, 1]ᵀ R.   ridge: λ. It holds features of all sizes
    back alike: next to one with massive activations, a ridge that is the same for all would hold back all others.
    With a bias ‖F_k‖ is the size around the mean.
    Raises NumericalError for entries that are not finite.
    """
    gram, pull = check_gram(gram), pull.double()
    check_finite(pull, "pull")
    features, wanted = gram[:-1, :-1], pull[:-1]
    tokens = gram[-1, -1].clamp_min(1)
    mean, mean_wanted = gram[:-1, -1] / tokens, pull[-1] / tokens
    if bias:
        features = features - tokens * torch.outer(mean, mean)
        wanted = wanted - tokens * torch.outer(mean, mean_wanted)
    smallest = (SMALLEST_SPREAD * gram.diagonal()[:-1]).clamp_min(torch.finfo(gram.dtype).tiny)
    unit = torch.maximum(features.diagonal(), smallest).rsqrt()[:, None]
    change = unit * torch.cholesky_solve(unit * wanted, factorise(unit * features * unit.T, ridge, unit=1.0).lower)
    return change, mean_wanted - mean @ change if bias else None


def step_length(gram: Tensor, pull: Tensor, change: Tensor, offset: Tensor | None) -> float:
    """The t in 0..1 that minimises ‖R − t (F Δ + δ)‖² over rows that Δ was not fitted to.

    gram, pull: of those rows, as in `correction`.   change: Δ.   offset: δ.
    """
    full = torch.cat([change, change.new_zeros(1, change.shape[1]) if offset is None else offset[None]])
    gained, spent = float((full * pull.double()).sum()), float((full * (gram.double() @ full)).sum())
    return min(best_length(gained, spent), 1.0)


def best_length(gained: float, spent: float) -> float:
    """The t ≥ 0 that minimises t² · spent − 2 t · gained: of a squared error along a change."""
    return max(gained / spent, 0.0) if spent > 0 else 0.0
