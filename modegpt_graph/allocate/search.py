"""The largest ratio whose cost stays within a limit, found by few measurements: predicted, measured, corrected."""

import math
from collections.abc import Callable
from dataclasses import dataclass

AIM = 0.96  # of the limit: where a try is put, so that what it misses by is more often below than above
NEAR = 0.88  # of the limit: a try that comes to this much is near enough
STEP = 1e-3  # ratios nearer to each other than this are not worth another measurement
TRIES = 6  # before the best one so far is taken
LAST_TRIES = 6  # further ones, smaller by halves, where none was within the limit yet


@dataclass(frozen=True)
class Tried:
    """A ratio, what it was expected to cost after all corrections so far, and what it cost."""

    ratio: float
    predicted: float
    measured: float


def largest_within(
    predict: Callable[[float], float], measure: Callable[[float], float], limit: float, highest: float
) -> tuple[Tried, ...]:
    """Ratios in the order in which they were measured, the best one last: the largest that costs at most `limit`.

    predict: what a ratio is expected to cost, non-decreasing, 0 at 0.   measure: what it costs.   highest: the largest
    ratio there is. What is measured is taken for c · predict^e: e is 1 until two tries tell more (a secant step in
    logarithms). Empty where no try was within the limit.
    """
    tries: list[tuple[float, Tried]] = []  # with the plain prediction
    low, high = 0.0, highest
    while high - low >= STEP and (len(tries) < TRIES or (low == 0.0 and len(tries) < TRIES + LAST_TRIES)):
        corrected = _correction([(plain, one.measured) for plain, one in tries])
        ratio = _inverse(lambda ratio, corrected=corrected: corrected(predict(ratio)), AIM * limit, low, high)
        if len(tries) >= TRIES or any(abs(ratio - one.ratio) < STEP for _, one in tries):
            ratio = (low + high) / 2
        plain = predict(ratio)
        tries.append((plain, Tried(ratio, corrected(plain), measure(ratio))))
        if tries[-1][1].measured > limit:
            high = ratio
            continue
        low = ratio
        if tries[-1][1].measured >= NEAR * limit:
            break
    within = [one for _, one in tries if one.measured <= limit]
    if not within:
        return ()
    best = max(within, key=lambda one: one.ratio)
    return (*(one for _, one in tries if one is not best), best)


def _correction(known: list[tuple[float, float]]) -> Callable[[float], float]:
    """From what was predicted to what is to be expected, by pairs (predicted, measured) in the order they came."""
    points = [
        (math.log(predicted), math.log(measured)) for predicted, measured in known if min(predicted, measured) > 0
    ]
    if not points:
        return lambda predicted: predicted
    slope, (x, y) = 1.0, points[-1]
    if len(points) > 1 and points[-1][0] != points[-2][0]:
        # A power beyond these is noise of two tries that are near each other.
        slope = min(max((y - points[-2][1]) / (x - points[-2][0]), 0.5), 3.0)
    return lambda predicted: math.exp(y + slope * (math.log(predicted) - x)) if predicted > 0 else 0.0


def _inverse(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where a non-decreasing function comes to `value` between low and high, one of them where it does not."""
    if function(high) <= value:
        return high
    while high - low > STEP / 2:
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) <= value else (low, middle)
    return low
