"""`compare`: our decomposition beside the field's methods, in one run on one calibration."""

import difflib
from typing import Annotated

import typer

from modegpt_graph.commands import checks, options
from modegpt_graph.commands.runtime import messages, quieten, results, write_json
from modegpt_graph.errors import InputError
from modegpt_graph.methods.names import METHODS

EVALUATION = "Evaluation"


def compare(
    model: options.Model,
    methods: Annotated[
        str,
        typer.Option("--methods", metavar="NAMES", help=f"Separated by commas: {', '.join(METHODS)}; or all."),
    ] = "all",
    ratios: Annotated[
        str, typer.Option("--ratios", metavar="R,R,…", help="Shares of the decoder-layer matrices to remove.")
    ] = "0.1,0.2,0.3",
    calibration: options.CalibrationText = "wikitext2",
    calibration_windows: options.CalibrationWindows = 32,
    calibration_window: options.CalibrationWindow = 1024,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE|NAME",
            rich_help_panel=EVALUATION,
            help="What perplexity is measured on, as for eval.",
            show_default="windows held out of the calibration text",
        ),
    ] = None,
    window: Annotated[
        int, typer.Option("--window", metavar="N", rich_help_panel=EVALUATION, help="Tokens in each window of --text.")
    ] = 2048,
    windows: Annotated[
        int | None,
        typer.Option(
            "--windows",
            metavar="N",
            rich_help_panel=EVALUATION,
            help="Only the first N windows of --text.",
            show_default="all",
        ),
    ] = None,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
    html_file: options.HtmlFile = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Compare methods on one model: the same calibration, the same evaluation, the same count of parameters.

    [bold]Examples[/bold]

    modegpt-graph compare demo --methods ours,paper,shortgpt --ratios 0.2,0.3

    modegpt-graph compare demo --calib valid.txt --text test.txt --windows 10 --html comparison.html
    """
    names, shares = _methods(methods), _ratios(ratios)
    checks.text_source("--calib", calibration)
    checks.at_least("--calib-windows", calibration_windows, 1)
    checks.at_least("--calib-window", calibration_window, 2)
    if text is not None:
        checks.text_source("--text", text)
    checks.at_least("--window", window, 2)
    checks.at_least("--windows", windows, 1)
    checks.out_file("--json", json_file)
    checks.out_file("--html", html_file)
    quieten()
    from modegpt_graph import api
    from modegpt_graph.report.compare import comparison_json
    from modegpt_graph.report.compare_console import render_comparison
    from modegpt_graph.report.compare_html import comparison_html
    from modegpt_graph.report.files import write_text
    from modegpt_graph.report.progress import ConsoleProgress

    with ConsoleProgress(messages()) as progress:
        comparison = api.compare_methods(
            model,
            names,
            shares,
            calibration=calibration,
            calibration_windows=calibration_windows,
            calibration_window=calibration_window,
            text=text,
            window=window,
            windows=windows,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    write_json(json_file, comparison_json(comparison))
    if html_file is not None:
        write_text(html_file, comparison_html(comparison))
    render_comparison(comparison, results(json_file))


def _methods(text: str) -> tuple[str, ...]:
    """Names, each once. Raises InputError for one that is none."""
    if text.strip() == "all":
        return tuple(METHODS)
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(METHODS)}"
            raise InputError(f"--methods: there is no method {name!r}; {advice}")
    if not names:
        raise InputError(f"--methods names none; known: {', '.join(METHODS)}")
    return tuple(dict.fromkeys(names))


def _ratios(text: str) -> tuple[float, ...]:
    """Ratios, ascending, each once. Raises InputError for one that is none."""
    found = []
    for part in (part.strip() for part in text.split(",")):
        try:
            found.append(float(part))
        except ValueError:
            raise InputError(f"--ratios: {part!r} is no number; write them as 0.1,0.2,0.3") from None
        checks.ratio(found[-1], "--ratios")
    return tuple(sorted(set(found)))
