"""The scale of logits at which they tell most nearly what others do.

Source: temperature scaling, Guo et al. (arXiv 1706.04599); here towards a model's distributions, not towards labels.
"""

from itertools import pairwise

import torch
from torch import Tensor

SCALES = (0.7, 0.8, 0.9, 1.0, 1.1)  # the KL divergence is convex in the scale: its slope rises from each to the next


def divergence_slopes(wanted: Tensor, logits: Tensor, direction: Tensor) -> Tensor:
    """(n,) float64: at each of SCALES s, d/ds of Σ KL(softmax(wanted) ‖ softmax(logits + (s − 1) direction)) over rows.

    wanted, logits: (…, V).   direction: (…, V) what logits gain as they are scaled: the logits themselves, where
    nothing is added to them or caps them.
    """
    wanted, logits, direction = wanted.float(), logits.float(), direction.float()
    at_wanted = torch.linalg.vecdot(wanted.softmax(-1), direction).sum(dtype=torch.float64)
    slopes = [
        torch.linalg.vecdot(torch.add(logits, direction, alpha=scale - 1).softmax(-1), direction).sum(
            dtype=torch.float64
        )
        for scale in SCALES
    ]
    return torch.stack(slopes) - at_wanted


def best_scale(slopes: Tensor) -> float:
    """Where slopes (n,) at SCALES cross zero; the first or last of SCALES where they do not.

    It is 1 where slopes do not rise: then the scale makes no difference, or they are not finite.
    """
    found = list(zip(SCALES, slopes.tolist(), strict=True))
    if not found[-1][1] > found[0][1]:
        return 1.0
    if found[0][1] >= 0:
        return SCALES[0]
    for (low, below), (high, above) in pairwise(found):
        if above >= 0:
            return low + (high - low) * below / (below - above)
    return SCALES[-1]
