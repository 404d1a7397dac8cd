"""The ratio is found, not given: for a perplexity or for a size that must not be exceeded."""

import math
import re
from collections.abc import Callable, Mapping

from modegpt_graph import checkpoint
from modegpt_graph.allocate.search import largest_within
from modegpt_graph.compression import Prepared, Result, check_request
from modegpt_graph.errors import InputError
from modegpt_graph.evaluate import perplexity
from modegpt_graph.progress import Clock
from modegpt_graph.report import words
from modegpt_graph.report.measure import Built
from modegpt_graph.report.outcome import Search, Try

SIZE_TRIES = 5
ANY = 1.0  # tolerance: whatever ratio is nearest


def share_of(text: str) -> float:
    """10%, 10 % or 0.1 as 0.1. Raises InputError for anything else."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%?)", text.strip())
    if found is None:
        raise InputError(f"{text!r} is no share; write 10% or 0.1")
    share = float(found[1]) / (100 if found[2] else 1)
    if share >= 1 and not found[2]:
        raise InputError(f"{text} is a share of {share:.0%}; write {text}% for {text} in a hundred, or {share:.0%}")
    return share


def checked_increase(increase: float) -> float:
    """An increase of perplexity as a share (0.1 is 10 %). Raises InputError outside (0, 100)."""
    if not 0 < increase < 100:
        raise InputError(f"an increase of {increase:g} is outside (0, 100); 0.1 allows 10 % more perplexity")
    return increase


def bytes_of(size: int | str) -> int:
    """100MB, 1.5 GB, 300kB or a number of bytes; powers of 1000, as discs are sold, or of 1024 as MiB."""
    if isinstance(size, str):
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?", size.strip().lower().replace(",", ""))
        if found is None:
            raise InputError(f"{size!r} is no size; write 100MB, 1.5GB or a number of bytes")
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))
    if size < 1:
        raise InputError(f"a size of {size} bytes is too small")
    return int(size)


def within_perplexity(prepared: Prepared, increase: float, allocator: str | None, budget: str) -> Result:
    """The largest ratio at which perplexity on the held-out windows is at most `increase` (0.1 is 10 %) higher.

    Predicted from the divergence that each site is expected to cause; the sum stands for the rise of the
    log-perplexity. Each try is measured, and corrects what is predicted next.
    Raises InputError where nothing was held out, or not even the smallest ratio tried stays within.
    """
    check_request(None, allocator, prepared.preset, budget)
    held_out, decomposed = prepared.held_out, prepared.decomposed
    if held_out is None:
        raise InputError("no windows are left to measure perplexity on; calibrate on two windows at least")
    spread = prepared.allocator(allocator)
    with prepared.clock("allocate"):
        _ = decomposed.divergences
    with prepared.clock("search"), prepared.progress.stage("find the ratio"):
        dense = math.log(perplexity(decomposed.dense, held_out))

        def ranks(ratio: float) -> dict[str, int]:
            return prepared.ranks(ratio, spread, budget, tolerance=ANY)

        best: dict[
            float, Built
        ] = {}  # the model of the largest ratio within the limit so far: it need not be made again

        def measure(ratio: float) -> float:
            built = prepared.build(ranks(ratio), Clock())
            change = math.log(perplexity(built.model, held_out)) - dense
            if change <= math.log1p(increase) and ratio > max(best, default=0.0):
                best.clear()
                best[ratio] = built
            return change

        highest = min(0.95, decomposed.highest_ratio(budget))
        tried = largest_within(
            lambda ratio: decomposed.expected_divergence(ranks(ratio)), measure, math.log1p(increase), highest
        )
    if not tried:
        raise InputError(
            f"no ratio that was tried keeps perplexity within {words.percent(increase)} of the original on the "
            "held-out text; allow more, or calibrate on more text"
        )
    tries = tuple(Try(one.ratio, math.expm1(one.predicted), math.expm1(one.measured)) for one in tried)
    search = Search("max_perplexity_increase", increase, tries)
    found = tried[-1].ratio
    return prepared.result(ranks(found), found, spread, budget, search, best[found])


def within_size(prepared: Prepared, size: int, allocator: str | None, budget: str) -> Result:
    """The model whose saved weights have at most `size` bytes, and less than one step of rank fewer.

    Predicted from what each rank stores, and corrected by the size of the file that the smaller model really has.
    Raises InputError where the model is that small already, or cannot become that small.
    """
    check_request(None, allocator, prepared.preset, budget)
    decomposed = prepared.decomposed
    full = checkpoint.weights_size(decomposed.dense)
    if size >= full:
        raise InputError(f"the weights have {full:,} bytes already, which is within {size:,}; ask for less")
    spread = prepared.allocator(allocator)
    highest = min(0.95, decomposed.highest_ratio(budget))
    step = min(item.cost_per_rank * item.multiple for item in decomposed.costs.items(decomposed.items, "bytes"))
    tries: list[Try] = []
    correction = 0
    with prepared.clock("search"), prepared.progress.stage("find the ratio"):

        def expected(ranks: Mapping[str, int]) -> int:
            return full - decomposed.removed(ranks, "bytes") + correction

        def at(ratio: float) -> dict[str, int]:
            return prepared.ranks(ratio, spread, budget, tolerance=ANY)

        for _ in range(SIZE_TRIES):
            ratio, ranks = _smallest(at, lambda ranks: expected(ranks) <= size, highest)
            if expected(ranks) > size:
                raise InputError(
                    f"the weights cannot have {size:,} bytes: with every site at its smallest they have "
                    f"{expected(ranks):,} at least; allow more"
                )
            ranks = _filled(prepared, ranks, size - expected(ranks))
            smaller, _ = decomposed.model(decomposed.solutions(ranks))
            measured = checkpoint.weights_size(smaller)
            tries.append(Try(ratio, expected(ranks), measured))
            if measured == expected(ranks) or 0 <= size - measured < step:
                break
            correction += measured - expected(ranks)
    within = [one for one in tries if one.measured <= size]
    if not within or within[-1] is not tries[-1]:
        raise InputError(f"no ratio was found that leaves {size:,} bytes; the last one left {tries[-1].measured:,}")
    search = Search("target_size", size, tuple(tries))
    total = decomposed.costs.totals[budget]
    return prepared.result(ranks, decomposed.removed(ranks, budget) / total, spread, budget, search)


def _smallest(
    at: Callable[[float], dict[str, int]], fits: Callable[[Mapping[str, int]], bool], highest: float
) -> tuple[float, dict[str, int]]:
    """The smallest ratio whose ranks fit, by bisection, and its ranks; the largest ratio there is where none does."""
    low, high = 0.0, highest
    best = at(high)
    if not fits(best):
        return high, best
    for _ in range(24):
        middle = (low + high) / 2
        ranks = at(middle)
        if fits(ranks):
            high, best = middle, ranks
        else:
            low = middle
    return high, best


def _filled(prepared: Prepared, ranks: Mapping[str, int], left: int) -> dict[str, int]:
    """Ranks raised by single steps, the largest that fits first, until none fits into the bytes that are left."""
    decomposed, filled = prepared.decomposed, dict(ranks)
    items = [item for item in decomposed.costs.items(decomposed.items, "bytes") if item.cost_per_rank]
    while True:
        steps = []
        for item in items:
            rank = filled[item.id]
            above = item.above(rank) if rank < item.full_rank else None
            if above is not None and (cost := (above - rank) * item.cost_per_rank) <= left:
                steps.append((cost, item.id, above))
        if not steps:
            return filled
        cost, site, above = max(steps)
        filled[site] = above
        left -= cost
