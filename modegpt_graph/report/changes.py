"""What was asked, what was reached, and dense against compressed, one row a quantity, for console and HTML."""

from collections.abc import Callable

from modegpt_graph.report import words
from modegpt_graph.report.outcome import CompressionOutcome, Search
from modegpt_graph.rewrite.costs import BUDGETS

Row = tuple[str, str, str, str]


def change_rows(outcome: CompressionOutcome) -> list[Row]:
    """Name, dense, compressed, change: what was measured; a row for which nothing was measured is not there."""
    o = outcome
    of, context = o.reductions, "" if o.context is None else f", {o.context:,} attended to"
    rows = [_shrink("parameters", o.parameters_before, o.parameters_after, words.count)]
    if (matrices := of.get("parameters")) is not None:
        rows.append(_shrink("in decoder-layer matrices", matrices.before, matrices.after, words.count))
    rows.append(_shrink("bytes on disk", o.bytes_before, o.bytes_after, words.byte_count))
    if (products := of.get("multiply-adds")) is not None:
        rows.append(_shrink(f"multiply-adds per token{context}", products.before, products.after, words.count))
    cache = of.get("kv-cache")
    before, after = (
        (o.cache_bytes_per_token_before, o.cache_bytes_per_token_after)
        if cache is None
        else (cache.before, cache.after)
    )
    rows.append(_shrink("key/value cache per token", before, after, words.byte_count))
    if o.perplexity_dense is not None or o.perplexity_compressed is not None:
        both = o.perplexity_dense and o.perplexity_compressed
        change = f"×{o.perplexity_compressed / o.perplexity_dense:.2f}" if both else "not measured"  # type: ignore[operator]
        rows.append(("perplexity", _figure(o.perplexity_dense), _figure(o.perplexity_compressed), change))
    if o.kl is not None:
        rows.append(("KL from dense, nats per token", "0", words.figure(o.kl), ""))
    return [row for row in rows if row is not None]


def _shrink(name: str, before: int | None, after: int | None, form: Callable[[int], str]) -> Row | None:
    if before is None and after is None:
        return None
    if before is None or after is None:
        dense, compressed = ("not measured" if value is None else form(value) for value in (before, after))
        return name, dense, compressed, ""
    change = (after - before) / before if before else 0.0
    sign = "−" if change < 0 else "+" if change > 0 else ""
    return name, form(before), form(after), f"{sign}{words.percent(abs(change))}"


def _figure(value: float | None) -> str:
    return "not measured" if value is None else words.figure(value)


def asked_line(outcome: CompressionOutcome) -> tuple[str, str]:
    """The share that went of what the ratio is of, and of what and how much was asked: `30.0 %`, ` of …`."""
    reached = outcome.reductions.get(outcome.budget)
    share = outcome.ratios.decoder_linear if reached is None else reached.share
    asked = "found" if outcome.search is not None else "asked"
    return words.percent(share), f" of {BUDGETS[outcome.budget]} ({words.percent(outcome.ratio)} {asked})"


def search_line(search: Search) -> str:
    """One sentence: what was asked, what was predicted and measured, in how many tries."""
    last, tries = search.tries[-1], len(search.tries)
    if search.goal == "target_size":
        return (
            f"At most {search.limit:,.0f} bytes of weights were asked for: {last.predicted:,.0f} predicted, "
            f"{last.measured:,.0f} reached."
        )
    counted = f"{tries} ratio was" if tries == 1 else f"{tries} ratios were"
    return (
        f"At most {words.percent(search.limit)} more perplexity was asked for: {_signed(last.predicted)} predicted, "
        f"{_signed(last.measured)} measured on held-out windows; {counted} tried."
    )


def _signed(share: float) -> str:
    return f"{'−' if share < 0 else '+'}{words.percent(abs(share))}"
