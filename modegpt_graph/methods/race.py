"""Every method at every ratio, measured alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from modegpt_graph.errors import ModegptError
from modegpt_graph.methods.common import Setting
from modegpt_graph.methods.registry import PASSES


@dataclass(frozen=True)
class Entry:
    """One method at one ratio.

    achieved: share of the decoder-layer matrix parameters that went; adapters count as parameters that came.
    perplexity: infinite where the model is certain of wrong tokens.   reason: why there is no figure.
    seconds: to make the model, what a method does once for all ratios counted at the first.
    """

    method: str
    ratio: float
    achieved: float | None
    perplexity: float | None
    reason: str | None
    seconds: float


def race(
    setting: Setting, methods: Sequence[str], ratios: Sequence[float], measure: Callable[[nn.Module], float]
) -> tuple[Entry, ...]:
    """All methods at all ratios, one model in memory at a time.

    measure: perplexity of a model. What a method cannot do for this model is a reason in its entry, not an error.
    """
    entries = []
    for method in methods:
        entries += _one(setting, method, ratios, measure)
    return tuple(entries)


def _one(setting: Setting, method: str, ratios: Sequence[float], measure: Callable[[nn.Module], float]) -> list[Entry]:
    start = time.perf_counter()
    try:
        at = PASSES[method](setting)
    except ModegptError as error:
        return [Entry(method, ratio, None, None, str(error), 0.0) for ratio in ratios]
    entries = []
    for ratio in ratios:
        try:
            smaller = at(ratio)
            seconds = time.perf_counter() - start
            with setting.progress.stage(f"measure {method} at {ratio:g}"):
                found = measure(smaller.model)
            entries.append(Entry(method, ratio, smaller.removed / setting.total, found, None, seconds))
        except ModegptError as error:
            entries.append(Entry(method, ratio, None, None, str(error), time.perf_counter() - start))
        start = time.perf_counter()
    return entries
