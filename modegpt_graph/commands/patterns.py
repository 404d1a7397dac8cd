"""`patterns list` and `patterns check`: the pattern files, and whether a new one is sound and meets anything."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modegpt_graph.commands import checks, options
from modegpt_graph.commands.runtime import messages, quieten, results
from modegpt_graph.data import patterns_directory
from modegpt_graph.errors import InputError

if TYPE_CHECKING:
    from modegpt_graph.match.patterns import Pattern


def list_patterns() -> None:
    """Show the built-in patterns: their names, the forms they look for, and what is done with what they find.

    [bold]Example[/bold]

    modegpt-graph patterns list
    """
    quieten()
    from modegpt_graph.match.pattern_file import load_pattern

    directory = patterns_directory()
    console = results()
    for path in sorted(directory.glob("*.toml")):
        _describe(load_pattern(path), console)
    console.print(Text.assemble(("files  ", "dim"), str(directory)), soft_wrap=True)


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pattern file (.toml).", show_default=False)],
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Also say what the pattern meets in this model.", show_default=False),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Check a pattern file; with a MODEL, show what it meets there, or how near it came and what was in the way.

    Exit code 1 where it meets nothing in the MODEL, or where what it claims is refuted there.

    [bold]Examples[/bold]

    modegpt-graph patterns check my-pattern.toml

    modegpt-graph patterns check my-pattern.toml demo
    """
    if file.is_dir():
        raise InputError(f"{file} is a folder; name one pattern file in it")
    checks.pattern_sources([file], option="pattern file")
    quieten()
    from modegpt_graph.match.pattern_file import load_pattern

    pattern = load_pattern(file)
    console = results()
    _describe(pattern, console)
    if model is None:
        console.print(Text("The file is sound. Name a MODEL too to see what it meets there.", "green"))
        return
    from modegpt_graph import api
    from modegpt_graph.report.meeting import render_meeting
    from modegpt_graph.report.progress import ConsoleProgress

    with ConsoleProgress(messages()) as progress:
        meeting = api.check_pattern(file, model, trust_remote_code=trust_remote_code, progress=progress)
    render_meeting(meeting, model, console)
    if not meeting.sites or any(site.decomposition is None for site in meeting.sites):
        raise typer.Exit(1)


def _describe(pattern: "Pattern", console: Console) -> None:
    from modegpt_graph.report import words

    texts = {**({"": pattern.formula} if pattern.formula else {}), **pattern.variants}
    decomposition = pattern.decomposition
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column(overflow="fold")
    for name, text in texts.items():
        lines.add_row(name or "form", Text(text, "cyan"))
    method = words.METHODS[decomposition.method]
    if decomposition.otherwise:
        method += f", or {words.METHODS[decomposition.otherwise]} where that is refuted,"
    done = f"{method} on {', '.join(decomposition.select)}"
    if decomposition.refit:
        done += f"; {', '.join(decomposition.refit)} fitted again"
    lines.add_row("then", Text(done))
    console.print(Text(pattern.name, "bold"))
    console.print(lines)
    console.print()
