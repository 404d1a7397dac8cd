"""Least squares with unknowns that must not be negative."""

import torch
from torch import Tensor

STEPS = 500


def nonnegative(gram: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """The w ≥ 0 that minimises wᵀ·gram·w − 2 wᵀ·right, by accelerated projected gradient steps.

    gram: (…, n, n) positive definite: the smaller its condition number, the nearer 500 steps come.
    right, start: (…, n).
    Source: Beck and Teboulle, A Fast Iterative Shrinkage-Thresholding Algorithm (SIAM J. Imaging Sciences, 2009).
    """
    step = torch.linalg.matrix_norm(gram, ord=2)[..., None].reciprocal()  # (…, 1)
    found = ahead = start
    momentum = 1.0
    for _ in range(STEPS):
        pull = right - (gram @ ahead[..., None])[..., 0]
        following = (ahead + step * pull).clamp_min(0)
        faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / faster * (following - found)
        found, momentum = following, faster
    return found
