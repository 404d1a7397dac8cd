"""Reports on the console. Names come from strangers' models, so every string is put in as text, never as markup."""

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from modegpt_graph.allocate.budget import PARAMETERS
from modegpt_graph.match.sites import Analysis
from modegpt_graph.report import words
from modegpt_graph.report.bounds import EXPLAINED, BoundSeries, bound_series, violation_line, violations
from modegpt_graph.report.changes import asked_line, change_rows, search_line
from modegpt_graph.report.fold import SiteGroup, UnmatchedGroup, fold_sites, fold_unmatched
from modegpt_graph.report.outcome import CompressionOutcome
from modegpt_graph.report.ranks import rank_series, sparkline

WIDEST = 132


def render_analysis(analysis: Analysis, console: Console, *, next_step: bool = True, unmatched: bool = True) -> None:
    """Header, one line for each group of equal sites, why each was decided so, what was left alone, what to do next.

    next_step: whether to name the command that follows.   unmatched: whether to list what no pattern took.
    """
    width = min(console.width, WIDEST)
    groups = fold_sites(analysis.sites)
    console.print(_header(analysis), width=width)
    if groups:
        console.print(_sites_table(groups), width=width)
        _section(console, "Why", _reasons(groups), width)
    left = fold_unmatched(analysis.unmatched) if unmatched else ()
    if left:
        _section(console, "Left alone, no pattern took them", _unmatched(left), width)
    if next_step:
        usable = sum(site.decomposition is not None for site in analysis.sites)
        line = words.next_step(analysis.model.name, usable)
        console.print()
        console.print(Text.assemble(("Next  ", "bold"), line), width=width, soft_wrap=True)


def render_outcome(analysis: Analysis, outcome: CompressionOutcome, console: Console) -> None:
    """What the compression removed, the ranks it chose by layer, and dense against compressed in one table."""
    width = min(console.width, WIDEST)
    console.print(_asked(analysis, outcome), width=width)
    series = rank_series(analysis, outcome)
    if series:
        _section(console, "Kept, layer by layer", _rank_lines(analysis, outcome, width), width)
    bounds = bound_series(analysis, outcome)
    if bounds:
        _section(console, "Error and bound", _bound_table(bounds, violations(outcome)), width)
    console.print()
    console.print(_change_table(outcome))
    console.print(_footnotes(outcome), width=width)


def _header(analysis: Analysis) -> RenderableType:
    model = analysis.model
    refused = sum(site.decomposition is None for site in analysis.sites)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("architecture", Text(model.architecture))
    facts.add_row("parameters", f"{words.count(model.parameters)}, {_in_layers(model.decoder_linear_parameters)}")
    found = words.plural(len(analysis.sites), "site")
    if refused:
        found += f", {refused:,} of them cannot be made smaller"
    facts.add_row("found", found)
    covered = Text(words.percent(analysis.coverage), "green" if analysis.coverage == 1 else "bold")
    facts.add_row("coverage", covered + Text(" of the decoder layers' matrices belong to a site", "not bold default"))
    return Panel(
        facts, title=Text(model.name, "bold"), title_align="left", box=box.ROUNDED, border_style="dim", padding=(0, 1)
    )


def _in_layers(parameters: int) -> str:
    return f"{words.count(parameters)} of them in decoder-layer matrices"


def _sites_table(groups: tuple[SiteGroup, ...]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, expand=False, padding=(0, 1)
    )
    table.add_column("Layers", max_width=14)
    table.add_column("Site", overflow="fold")
    table.add_column("Type", no_wrap=True)
    table.add_column("Between", overflow="fold")
    table.add_column("Commutant", min_width=9, overflow="fold")
    table.add_column("Decision", min_width=10)
    for group in groups:
        site = group.example
        layers = Text(group.layers)
        if (group.per_layer or 0) > 1:
            layers.append(f" (×{group.per_layer})", "dim")
        kind = Text.assemble(site.type, (f" (paper {site.paper_type})", "dim") if site.type != site.paper_type else "")
        table.add_row(
            layers,
            Text.assemble((site.pattern, "bold"), "\n", (words.roles_line(site), "dim")),
            kind,
            Text(", ".join(site.between) or "nothing", "" if site.between else "dim"),
            Text(words.commutant_line(site)),
            Text(words.decision(site), "green" if site.decomposition else "red"),
        )
    return table


def _reasons(groups: tuple[SiteGroup, ...]) -> RenderableType:
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(no_wrap=False, max_width=28)
    lines.add_column(ratio=1, overflow="fold")
    for group in groups:
        site = group.example
        certificate = words.certificate_line(site.certificate)
        form = f"{site.variant} form; " if site.variant not in ("", "plain") else ""
        facts = f"{words.size_line(site)}; {form}{certificate}"
        lines.add_row(
            Text.assemble((words.roles_line(site), "bold"), "\n", (_where(group), "dim")),
            Text.assemble(words.sentence(site.reason), "\n", (facts, "dim" if site.certificate.holds else "red")),
        )
    return lines


def _where(group: SiteGroup) -> str:
    if group.layers == "none":
        return "outside the layers"
    return ("layer " if len({site.layer for site in group.sites}) == 1 else "layers ") + group.layers


def _unmatched(groups: tuple[UnmatchedGroup, ...]) -> RenderableType:
    blocks: list[RenderableType] = []
    for group in groups:
        nearest = group.example.nearest_pattern
        near = f"nearest pattern {nearest}: " if nearest else ""
        several = f"  {words.plural(len(group.entries), 'matrix')}" if len(group.entries) > 1 else ""
        blocks.append(Text.assemble((group.parameter, "bold"), (several, "dim"), overflow="fold"))
        blocks.append(Padding(Text.assemble((near, "dim"), words.sentence(group.example.reason)), (0, 0, 0, 2)))
    return Group(*blocks)


def _asked(analysis: Analysis, outcome: CompressionOutcome) -> RenderableType:
    reached = outcome.ratios
    share, asked = asked_line(outcome)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    lines.add_row(
        "removed",
        Text.assemble(
            (share, "bold"),
            f"{asked}\n",
            "" if outcome.budget == "parameters" else f"{words.percent(reached.decoder_linear)} of {PARAMETERS}, ",
            f"{words.percent(reached.without_embeddings)} of all parameters without embeddings, "
            f"{words.percent(reached.all)} of all",
        ),
    )
    if outcome.search is not None:
        lines.add_row("search", Text(search_line(outcome.search)))
    lines.add_row("calibration", Text(outcome.calibration))
    if outcome.fallback_reason:
        lines.add_row("", Text(f"not the text asked for: {outcome.fallback_reason}", "red"))
    lines.add_row("method", Text(words.method_line(outcome.preset, outcome.allocator, outcome.seed)))
    title = Text.assemble((analysis.model.name, "bold"), ", compressed")
    return Panel(lines, title=title, title_align="left", box=box.ROUNDED, border_style="dim", padding=(0, 1))


def _rank_lines(analysis: Analysis, outcome: CompressionOutcome, width: int) -> RenderableType:
    series = rank_series(analysis, outcome)
    label = max(len(one.roles) for one in series)
    room = max(8, width - label - max(len(one.span) for one in series) - 4)
    lines = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        lines.add_column(no_wrap=True)
    stands_for = 1
    for one in series:
        marks, stands_for = sparkline([layer.kept for layer in one.layers], room)
        lines.add_row(Text(one.roles, "bold"), Text(marks, "cyan"), Text(one.span, "dim"))
    scale = "one mark a layer" if stands_for == 1 else f"one mark for {stands_for} layers"
    return Group(
        lines,
        Text(
            f"{scale}, first to last; a full mark █ keeps every feature; smallest-largest rank of a group at right",
            "dim",
        ),
    )


def _bound_table(series: tuple[BoundSeries, ...], violated: tuple[str, ...]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for name in ("error", "bound", "bound/error", "med."):
        table.add_column(name, justify="right", no_wrap=True)
    for one in series:
        name = Text.assemble((one.roles, "bold"), "\n", (f"proposition {one.proposition}", "dim"))
        if one.error is None or one.bound is None or one.looseness is None:
            table.add_row(name, Text("not made smaller", "dim"), "", "", "")
            continue
        middle = words.short_figure(one.looseness.middle)
        table.add_row(name, str(one.error), str(one.bound), str(one.looseness), middle)
    parts: list[RenderableType] = [table, Text(f"{EXPLAINED} med.: the median of bound/error.", "dim")]
    if violated:
        parts.append(Text(violation_line(violated), "bold red"))
    return Group(*parts)


def _change_table(outcome: CompressionOutcome) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column("")
    for name in ("dense", "compressed", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in change_rows(outcome):
        table.add_row(row[0], row[1], Text(row[2], "bold"), row[3])
    return table


def _footnotes(outcome: CompressionOutcome) -> RenderableType:
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    if outcome.evaluation:
        lines.add_row("measured on", Text(outcome.evaluation))
    if outcome.approximation:
        lines.add_row("norms", Text(outcome.approximation))
    if outcome.choices:
        lines.add_row("chosen", Text("\n".join(outcome.choices)))
    if outcome.counted:
        lines.add_row("counted", Text(outcome.counted))
    if outcome.reused:
        lines.add_row("reused", Text(" ".join(outcome.reused)))
    time = words.time_line(outcome.seconds, outcome.forward_passes)
    if time:
        lines.add_row("time", Text(time))
    return Padding(lines, (1, 0, 0, 0))


def _section(console: Console, title: str, body: RenderableType, width: int) -> None:
    console.print()
    console.print(Rule(Text(title, "bold"), align="left", style="dim"), width=width)
    console.print(body, width=width)
