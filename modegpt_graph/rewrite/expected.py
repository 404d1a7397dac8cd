"""What a rank of a site is expected to cost the model, from the divergence measured at few of its ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

NOISE = 1e-6  # nats; a smaller divergence is rounding of the logits
NEAR = 4.0  # what was measured tells of errors up to so many times larger or smaller


def expected_divergences(errors: Tensor, measured: Mapping[int, float]) -> Tensor:
    """(d + 1,) nats at every rank: linear in the error between measurements, proportional to it beyond them.

    errors: (d + 1,) at ranks 0..d.   measured: rank → divergence there; what is less than noise counts as none.
    Of sites that cost nothing, those with the larger errors cost more, by less than the noise.
    """
    points = [(0.0, 0.0)]
    for error, divergence in sorted((float(errors[rank]), divergence) for rank, divergence in measured.items()):
        known = divergence if divergence > NOISE else 0.0
        points.append((error, max(known, points[-1][1])))
    knots, values = (torch.tensor(part, dtype=torch.float64) for part in zip(*points, strict=True))
    own = errors.double().clamp_min(0)
    right = torch.searchsorted(knots, own).clamp(1, len(knots) - 1)
    left = right - 1
    width = (knots[right] - knots[left]).clamp_min(1e-300)
    share = ((own - knots[left]) / width).clamp(0, 1)
    between = values[left] + share * (values[right] - values[left])
    beyond = values[-1] * own / knots[-1].clamp_min(1e-300)
    return torch.where(own > knots[-1], beyond, between) + NOISE * own


def is_told(errors: Tensor, measured: Mapping[int, float], rank: int) -> bool:
    """Whether what was measured tells of this rank: at an error like its own, or at none that is smaller."""
    error = float(errors[rank])
    known = [float(errors[other]) for other in measured]
    below, above = max((e for e in known if e <= error), default=None), min((e for e in known if e >= error), default=0)
    return below is None or error <= NEAR * below or 0 < above <= NEAR * error
