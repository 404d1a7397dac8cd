"""A comparison of methods on the console: one table, one chart, the reasons."""

import math

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from modegpt_graph.methods.names import METHODS
from modegpt_graph.methods.race import Entry
from modegpt_graph.report import words
from modegpt_graph.report.compare import Comparison, perplexity_text

WIDEST = 132
BAR = 40
MET = 0.005  # farther than this from the ratio asked for, the ratio achieved is told beside the figure


def render_comparison(comparison: Comparison, console: Console) -> None:
    """What was run, perplexity of every method at every ratio, a bar for each at the last one, and the reasons."""
    width = min(console.width, WIDEST)
    console.print(_header(comparison), width=width)
    console.print(_table(comparison), width=width)
    chart = _bars(comparison)
    if chart is not None:
        console.print()
        console.print(chart, width=width)
    reasons = comparison.reasons()
    if reasons:
        lines = Table.grid(padding=(0, 2, 0, 0))
        lines.add_column(no_wrap=True)
        lines.add_column(overflow="fold")
        for method, reason in reasons.items():
            lines.add_row(Text(method, "bold"), Text(words.sentence(reason)))
        console.print(Padding(lines, (1, 0, 0, 0)), width=width)


def _header(comparison: Comparison) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column(overflow="fold")
    lines.add_row("dense", Text(f"perplexity {perplexity_text(comparison.perplexity_dense)}"))
    lines.add_row("calibration", Text(comparison.calibration))
    if comparison.fallback_reason:
        lines.add_row("", Text(f"not the text asked for: {comparison.fallback_reason}", "red"))
    lines.add_row("measured on", Text(comparison.evaluation))
    size = words.count(comparison.model.decoder_linear_parameters)
    lines.add_row(
        "ratio", f"share of the {size} parameters of the decoder layers' matrices that goes, adapters counted"
    )
    title = Text.assemble((comparison.model.name, "bold"), ", methods compared")
    return Panel(lines, title=title, title_align="left", box=box.ROUNDED, border_style="dim", padding=(0, 1))


def _table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column("Perplexity", no_wrap=True)
    for ratio in comparison.ratios:
        table.add_column(words.percent(ratio), justify="right", no_wrap=True)
    table.add_column("Source", style="dim", no_wrap=True)
    for method in comparison.methods:
        cells = [_cell(entry, comparison.best(entry.ratio) is entry) for entry in comparison.of(method)]
        table.add_row(Text(method), *cells, Text(METHODS[method].source))
    return table


def _cell(entry: Entry, best: bool) -> Text:
    if entry.perplexity is None:
        return Text("not available", "dim")
    text = Text(perplexity_text(entry.perplexity), "bold green" if best else "")
    if entry.achieved is not None and abs(entry.achieved - entry.ratio) > MET:
        text.append(f"\nat {words.percent(entry.achieved)}", "not bold dim default")
    return text


def _bars(comparison: Comparison) -> RenderableType | None:
    """How much of the text's predictability each method loses at the last ratio: log perplexity over the dense one."""
    ratio = comparison.ratios[-1]
    lost = {
        entry.method: math.log(entry.perplexity / comparison.perplexity_dense)
        for entry in comparison.entries
        if entry.ratio == ratio and entry.perplexity is not None and math.isfinite(entry.perplexity)
    }
    most = max(lost.values(), default=0.0)
    if most <= 0:
        return None
    lines = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        lines.add_column(no_wrap=True)
    for method, value in sorted(lost.items(), key=lambda pair: pair[1]):
        lines.add_row(Text(method), Text("█" * max(round(BAR * value / most), 0) or "▏", "cyan"), f"{value:+.3f}")
    title = Text(f"Nats per token lost at {words.percent(ratio)}, least first", "bold")
    grid = Table.grid()
    grid.add_row(title)
    grid.add_row(lines)
    return grid
