"""Structured pruning: channels and heads by a score, and nothing fitted again but, for FLAP, a bias."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modegpt_graph.errors import InputError
from modegpt_graph.methods.common import Pass, Setting, Smaller
from modegpt_graph.methods.units import Units, units_of, without

Score = Callable[[Units], Tensor]


def uniform(setting: Setting) -> Pass:
    """Units drawn at random: what any score must beat.   Source: the baseline of Blalock et al. (arXiv 2003.03033)."""
    generator = torch.Generator().manual_seed(setting.seed)
    return _alike(setting, lambda one: torch.rand(one.count, generator=generator))


def magnitude(setting: Setting) -> Pass:
    """The units with the smallest norm of their weights go.

    Source: Li et al. (arXiv 1608.08710), who drop the filters with the smallest norm; here L2, over all that a channel
    owns in the matrices that give it and that read it (of a head, values and output).
    """
    return _alike(setting, lambda one: one.norms)


def wanda(setting: Setting) -> Pass:
    """The units with the smallest Σ |W_ij| · ‖x_j‖ go, the same share in every layer.

    Source: Wanda (arXiv 2306.11695), equation 1, summed over rows and units as in FLAP's Wanda-sp (arXiv 2312.11983).
    """
    return _alike(setting, lambda one: wanda_scores(one.gram, one.weight)[one.columns].sum(1))


def wanda_scores(gram: Tensor, weight: Tensor) -> Tensor:
    """(N,) Σ_i |W_ij| · ‖x_j‖₂ of every input feature. gram: (N, N) or more, of the inputs.   weight: (N, D)."""
    return weight.abs().sum(1) * gram.diagonal()[: len(weight)].clamp_min(0).sqrt()


def flap(setting: Setting) -> Pass:
    """The units that fluctuate least go, and what they are on average stays as a bias.

    A feature's score is Var(x_j) · ‖W_j‖², standardised within its site; a head's is the mean of its features'. All
    layers compete, by parameters.   Source: FLAP (arXiv 2312.11983), equations 5 to 8 (WIFV, adaptive structure).
    """
    units = units_of(setting)
    scores = []
    for one in units:
        own = fluctuation(one.gram, one.weight)
        scores.append(((own - own.mean()) / own.std().clamp_min(1e-300))[one.columns].mean(1))
    order = torch.cat(scores).argsort(stable=True)
    costs = torch.cat([torch.full((one.count,), one.cost) for one in units])
    sites = torch.cat([torch.full((one.count,), index) for index, one in enumerate(units)])
    firsts = [0, *torch.tensor([one.count for one in units]).cumsum(0).tolist()]

    def at(ratio: float) -> Smaller:
        target, removed = ratio * setting.total, 0
        left = [one.count for one in units]
        goes = torch.zeros(len(order), dtype=torch.bool)
        for index in order.tolist():
            site, cost = int(sites[index]), int(costs[index])
            if left[site] > 1 and abs(target - removed - cost) < abs(target - removed):
                goes[index] = True
                left[site] -= 1
                removed += cost
        _check_reached(removed, target, setting)
        kept = {
            one.site: (~goes[first : first + one.count]).nonzero().flatten()
            for one, first in zip(units, firsts, strict=False)
        }
        return without(setting, units, kept, compensate=True)

    return at


def fluctuation(gram: Tensor, weight: Tensor) -> Tensor:
    """(N,) sample variance of every input feature times the squared norm of its weights. gram: (N + 1, N + 1)."""
    tokens, sums = gram[-1, -1], gram[:-1, -1]
    variance = (gram.diagonal()[:-1] - sums.square() / tokens) / (tokens - 1)
    return variance.clamp_min(0) * weight.square().sum(1)


def _alike(setting: Setting, score: Score) -> Pass:
    """The same share of every layer's matrices: heads as near to the ratio as whole ones come, channels the rest."""
    units = units_of(setting)
    orders = {one.site: score(one).argsort(stable=True) for one in units}
    reachable = sum(one.cost * (one.count - 1) for one in units)

    def at(ratio: float) -> Smaller:
        target = ratio * setting.total
        if target > reachable:
            _check_reached(reachable, target, setting)
        share = target / sum(one.cost * one.count for one in units)
        counts: dict[str, int] = {}
        for layer in sorted({one.layer for one in units}):
            counts |= _counts([one for one in units if one.layer == layer], share)
        _repair(units, counts, target)
        kept = {one.site: orders[one.site][counts[one.site] :].sort().values for one in units}
        return without(setting, units, kept)

    return at


def _counts(layer: Sequence[Units], share: float) -> dict[str, int]:
    """Units to drop of every site of a layer."""
    target = share * sum(one.cost * one.count for one in layer)
    counts = {}
    for one in layer:
        if one.heads:
            counts[one.site] = min(round(share * one.count), one.count - 1)
            target -= counts[one.site] * one.cost
    channels = [one for one in layer if not one.heads]
    available = sum(one.cost * one.count for one in channels)
    for one in channels:
        wished = round(one.count * target / available)
        counts[one.site] = min(max(wished, 0), one.count - 1)
    return counts


def _repair(units: Sequence[Units], counts: dict[str, int], target: float) -> None:
    """Single units more or less, where they are cheapest, while that comes nearer to the target."""
    gap = target - sum(one.cost * counts[one.site] for one in units)
    while True:
        step = 1 if gap > 0 else -1
        open_to = [one for one in units if 0 <= counts[one.site] + step < one.count]
        nearer = [one for one in open_to if abs(gap - step * one.cost) < abs(gap)]
        if not nearer:
            return
        one = min(nearer, key=lambda one: (one.cost, step * counts[one.site] / one.count))
        counts[one.site] += step
        gap -= step * one.cost


def _check_reached(removed: float, target: float, setting: Setting) -> None:
    if target - removed > 0.005 * setting.total:
        raise InputError(
            f"channels and heads can give at most {removed / setting.total:.3f} of the decoder's linear parameters"
        )
