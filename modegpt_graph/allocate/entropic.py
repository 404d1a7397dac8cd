"""The paper's allocation: layers that change the stream least give most, tempered by entropy."""

import torch
from torch import Tensor

from modegpt_graph.errors import InputError

LARGEST_RATIO = 0.95


def uniform_ratios(layers: int, ratio: float) -> Tensor:
    """(L,) the same ratio everywhere."""
    return torch.full((layers,), float(ratio), dtype=torch.float64)


def entropic_ratios(
    scores: Tensor,
    ratio: float,
    temperature: float,
    *,
    largest: float = LARGEST_RATIO,
    weights: Tensor | None = None,
) -> Tensor:
    """φ = L · ratio · softmax(−s / ε), no entry above `largest`, the mean exactly `ratio`.

    scores: (L,) importance, larger keeps more.   temperature: ε > 0; infinity gives every layer the same.
    weights: (L,) share of the parameters that an entry stands for (attention and MLP blocks scored apart); then the
    weighted mean is `ratio`.   The maximum of Σ w_i (s_i(1 − φ_i) + ε H(φ_i)) with φ_i ≤ `largest` has the same
    exponential form, with the entries at the cap taken out, which is how the excess goes to the others.
    Raises InputError where `ratio` exceeds `largest`, scores are not finite or the temperature is not positive.
    Source: MoDeGPT (arXiv 2408.09632), section 3.3 and appendix B.11 for weights.
    """
    scores = scores.double()
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"{int((~torch.isfinite(scores)).sum())} of {len(scores)} importance scores are not finite")
    if not temperature > 0:
        raise InputError(f"temperature {temperature:g} is not positive; the paper uses 0.1 to 1")
    if not 0 <= ratio <= largest:
        raise InputError(f"ratio {ratio:g} is outside 0..{largest:g}, the most that a layer may give")
    weights = torch.ones_like(scores) if weights is None else weights.double()
    goal = ratio * float(weights.sum())
    logits = -(scores - scores.min()) / temperature
    shape = logits.clamp_min(-700).exp()
    capped = torch.zeros(len(scores), dtype=torch.bool)
    ratios = torch.zeros_like(scores)
    for _ in range(len(scores) + 1):
        rest = goal - largest * float(weights[capped].sum())
        mass = float((weights * shape)[~capped].sum())
        ratios = torch.where(capped, largest, shape * (max(rest, 0.0) / mass if mass > 0 else 0.0))
        above = (ratios > largest) & ~capped
        if not bool(above.any()):
            break
        capped = capped | above
    return ratios


def temperature_for(scores: Tensor, ratio: float, *, largest: float = 0.8) -> float:
    """The ε at which the largest layer ratio is `largest`: the paper's rule of thumb. Infinite where no ε can reach it.

    scores: (L,).   Without a cap the largest ratio falls from L·ratio towards `ratio` as ε rises, so bisection finds
    it.
    Source: MoDeGPT (arXiv 2408.09632), section 3.3.
    """
    scores = scores.double()
    spread = float(scores.max() - scores.min())
    if ratio >= largest or spread == 0.0:
        return float("inf")

    def peak(temperature: float) -> float:
        return float(len(scores) * ratio * torch.softmax(-scores / temperature, 0).max())

    low, high = spread * 1e-6, spread * 1e6
    if peak(low) <= largest:
        return low
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if peak(middle) > largest else (low, middle)
    return high
