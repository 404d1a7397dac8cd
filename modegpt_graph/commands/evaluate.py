"""`eval`: perplexity of a model or of a folder that `compress` wrote."""

from typing import Annotated

import typer
from rich.text import Text

from modegpt_graph.commands import checks, options
from modegpt_graph.commands.runtime import messages, quieten, results, write_json


def evaluate(
    model: options.Model,
    text: Annotated[
        str, typer.Option("--text", metavar="FILE|NAME", help="A .txt, .json, .jsonl or .parquet file, or wikitext2.")
    ],
    window: Annotated[int, typer.Option("--window", metavar="N", help="Tokens in each window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option("--windows", metavar="N", help="Only the first N windows.", show_default="all")
    ] = None,
    json_file: options.JsonFile = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure perplexity: the text tokenised once, in windows that do not overlap.

    [bold]Example[/bold]

    modegpt-graph eval small --text wikitext2 --windows 10
    """
    checks.text_source("--text", text)
    checks.at_least("--window", window, 2)
    checks.at_least("--windows", windows, 1)
    checks.out_file("--json", json_file)
    quieten()
    from modegpt_graph import api
    from modegpt_graph.report import words
    from modegpt_graph.report.progress import ConsoleProgress

    with ConsoleProgress(messages()) as progress:
        measured = api.evaluate(
            model, text, window=window, windows=windows, trust_remote_code=trust_remote_code, progress=progress
        )
    plain = {name: getattr(measured, name) for name in ("perplexity", "windows", "window", "text")}
    write_json(json_file, plain)
    on = f"  on {words.plural(measured.windows, 'window')} of {measured.window:,} tokens of {measured.text}"
    console = results(json_file)
    console.print(Text.assemble("perplexity  ", (words.figure(measured.perplexity), "bold"), on), soft_wrap=True)
