"""`explain`: the report of a finished compression, drawn again."""

import json
from pathlib import Path

from modegpt_graph.commands import checks, options
from modegpt_graph.commands.runtime import results
from modegpt_graph.errors import InputError

REPORT = "report.json"


def explain(
    directory: options.CompressedFolder,
    html_file: options.HtmlFile = None,
) -> None:
    """Show the report of a compressed model again: what was done to each layer, and why.

    [bold]Example[/bold]

    modegpt-graph explain small --html report.html
    """
    checks.out_file("--html", html_file)
    from modegpt_graph.report.console import render_analysis, render_outcome
    from modegpt_graph.report.files import write_text
    from modegpt_graph.report.html import to_html
    from modegpt_graph.report.schema import from_json

    analysis, outcome = from_json(_read(directory), where=str(directory / REPORT))
    if html_file is not None:
        write_text(html_file, to_html(analysis, outcome))
    console = results()
    render_analysis(analysis, console, next_step=False)
    console.print()
    render_outcome(analysis, outcome, console)


def _read(directory: Path) -> dict:
    path = directory / REPORT
    if not directory.is_dir():
        raise InputError(f"there is no folder {directory}; name a folder that compress wrote")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory} has no {REPORT}; name a folder that compress wrote") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(report, dict):
        raise InputError(f"{path} is not a report: it holds a {type(report).__name__}")
    return report
