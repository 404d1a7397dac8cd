"""Dense against compressed, one row a quantity: the table that console and HTML show."""

from collections.abc import Callable

from modegpt_graph.report import words
from modegpt_graph.report.outcome import CompressionOutcome

Row = tuple[str, str, str, str]


def change_rows(outcome: CompressionOutcome) -> list[Row]:
    """Name, dense, compressed, change: what was measured; a row for which nothing was measured is not there."""
    o = outcome
    rows = [_shrink("parameters", o.parameters_before, o.parameters_after, words.count)]
    rows.append(_shrink("bytes on disk", o.bytes_before, o.bytes_after, words.byte_count))
    cache = _shrink(
        "key/value cache per token", o.cache_bytes_per_token_before, o.cache_bytes_per_token_after, words.byte_count
    )
    rows.append(cache)
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
