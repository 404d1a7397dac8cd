"""`eval`: perplexity and zero-shot accuracy of a model or of a folder that `compress` wrote."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modegpt_graph.commands import checks, options
from modegpt_graph.commands.runtime import messages, quieten, results, write_json
from modegpt_graph.errors import InputError

if TYPE_CHECKING:
    from modegpt_graph.api import Evaluation


def evaluate(
    model: options.Model,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE|NAME", help="A .txt, .json, .jsonl or .parquet file, or wikitext2."),
    ] = None,
    window: Annotated[int, typer.Option("--window", metavar="N", help="Tokens in each window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option("--windows", metavar="N", help="Only the first N windows.", show_default="all")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="FILE,…",
            help="Questions with several answers, for zero-shot accuracy: .jsonl files with query, choices and gold, "
            "or context_options, continuation and gold.",
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option("--questions", metavar="N", help="Only the first N of each task.", show_default="all"),
    ] = None,
    json_file: options.JsonFile = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure perplexity, the text tokenised once, in windows that do not overlap; and zero-shot accuracy.

    [bold]Examples[/bold]

    modegpt-graph eval small --text wikitext2 --windows 10

    modegpt-graph eval small --tasks arc_easy.jsonl,piqa.jsonl
    """
    files = [part.strip() for part in (tasks or "").split(",") if part.strip()]
    if text is None and not files:
        raise InputError("nothing to evaluate on: give --text, --tasks, or both")
    if text is not None:
        checks.text_source("--text", text)
    checks.task_files(files)
    checks.at_least("--window", window, 2)
    checks.at_least("--windows", windows, 1)
    checks.at_least("--questions", questions, 1)
    checks.out_file("--json", json_file)
    quieten()
    from modegpt_graph import api
    from modegpt_graph.report.progress import ConsoleProgress

    with ConsoleProgress(messages()) as progress:
        measured = api.evaluate(
            model,
            text,
            window=window,
            windows=windows,
            tasks=files,
            questions=questions,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    write_json(json_file, _json(measured))
    _draw(measured, results(json_file))


def _json(measured: "Evaluation") -> dict[str, object]:
    """Perplexity where there was a text, tasks where there were some."""
    plain: dict[str, object] = {}
    if measured.perplexity is not None:
        plain = {name: getattr(measured, name) for name in ("perplexity", "windows", "window", "text")}
    return plain | ({"tasks": [asdict(one) for one in measured.tasks]} if measured.tasks else {})


def _draw(measured: "Evaluation", console: Console) -> None:
    from modegpt_graph.report import words

    if measured.perplexity is not None:
        size = f"{words.plural(measured.windows or 0, 'window')} of {measured.window:,} tokens"
        figure = (words.figure(measured.perplexity), "bold")
        console.print(Text.assemble("perplexity  ", figure, f"  on {size} of {measured.text}"), soft_wrap=True)
    if not measured.tasks:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("task")
    for name in ("questions", "accuracy", "by length", "guessing"):
        table.add_column(name, justify="right")
    for one in measured.tasks:
        table.add_row(
            one.name,
            f"{one.questions:,}",
            _share(one.accuracy, one.accuracy_error),
            _share(one.normalised, one.normalised_error),
            words.percent(one.chance),
        )
    console.print(table)
    console.print(
        "accuracy: the likeliest answer is the right one; by length: likeliest per character; ± standard error",
        style="dim",
    )


def _share(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f} %"
