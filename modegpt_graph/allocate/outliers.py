"""OWL's allocation: layers with more outliers keep more, within a narrow band."""

import torch
from torch import Tensor

from modegpt_graph.allocate.entropic import LARGEST_RATIO

BAND = 0.08  # how far, either way, a layer may be from the ratio asked for: the paper's λ


def outlier_ratios(shares: Tensor, ratio: float, *, band: float = BAND) -> Tensor:
    """φ_l = ratio + mean(d) − d_l with d = 2 · band · (D − min D) / (max D − min D); the same where all D are equal.

    shares: (L,) D, share of outliers.   Ratios are held within 0 and the largest that a layer may give.
    Source: OWL (arXiv 2310.05175), section 3.2 and its published code, which centres the band on its mean.
    """
    shares = shares.double()
    spread = float(shares.max() - shares.min())
    kept = 2 * band * (shares - shares.min()) / spread if spread > 0 else torch.zeros_like(shares)
    return (ratio + kept.mean() - kept).clamp(0.0, max(LARGEST_RATIO, ratio))
