"""Gram matrices with the products of different features drawn towards zero, where a calibration text tells too little.

A refit lets features stand in for others that went with them in the calibration text. How features go together differs
from text to text more than how large they are; and of few tokens, it is mostly chance.
"""

import torch
from torch import Tensor


def shrunk(gram: Tensor, share: float) -> Tensor:
    """(1 − ρ) C + ρ diag(C), ρ = `share`, where C is the centred part of [X, 1]ᵀ [X, 1]; means stay as they are.

    gram: (N + 1, N + 1).   Of no tokens it is the identity: features of equal size that have nothing to do with each
    other.
    """
    if not float(gram[-1, -1]):
        return torch.eye(len(gram), dtype=gram.dtype)
    centred = _centred(gram)
    result = gram.clone()
    result[:-1, :-1] -= share * (centred - torch.diag(centred.diagonal()))
    return result


def chance_share(gram: Tensor) -> float:
    """The ρ of `shrunk` with the least expected squared error for Gaussian features; 1 where no token was seen.

    Source: Schäfer and Strimmer (2005), a shrinkage approach to large-scale covariance matrix estimation, target D.
    """
    tokens = float(gram[-1, -1])
    if not tokens:
        return 1.0
    centred = _centred(gram)
    diagonal = centred.diagonal().clamp_min(0)
    products = float(centred.square().sum() - centred.diagonal().square().sum())
    chance = float(diagonal.sum().square() - diagonal.square().sum()) + products
    return min(1.0, chance / (tokens * products)) if products > 0 else 0.0


def share_left(gram: Tensor, share: float) -> float:
    """An s with `shrunk(gram, share)` ≥ s · gram, as quadratic forms: an error there is at least s times the one here.

    With R the correlations, D the diagonal of the centred C: C ≤ ‖R‖_F D, so (1 − ρ) C + ρ D ≥ (1 − ρ + ρ/‖R‖_F) C.
    0 where no token was seen.
    """
    if not float(gram[-1, -1]):
        return 0.0
    centred = _centred(gram)
    scale = centred.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    correlated = float((centred * scale[:, None] * scale).square().sum().sqrt())
    return 1 - share + share / max(correlated, 1.0)


def _centred(gram: Tensor) -> Tensor:
    mean = gram[:-1, -1] / gram[-1, -1]
    return gram[:-1, :-1] - gram[-1, -1] * torch.outer(mean, mean)
