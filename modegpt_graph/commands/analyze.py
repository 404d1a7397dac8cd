"""`analyze`: what could be made smaller, and why."""

from pathlib import Path

from rich.text import Text

from modegpt_graph.commands import checks, options
from modegpt_graph.commands.runtime import messages, quieten, results, write_json
from modegpt_graph.data import architectures_directory


def analyze(
    model: options.Model,
    patterns: options.Patterns = None,
    json_file: options.JsonFile = None,
    html_file: options.HtmlFile = None,
    approximate_norm: options.ApproximateNorm = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Find the matrices that can be made smaller together, and say why. Needs no weights.

    [bold]Examples[/bold]

    modegpt-graph analyze demo

    modegpt-graph analyze llama-2-70b --html report.html
    """
    checks.out_file("--json", json_file)
    checks.out_file("--html", html_file)
    checks.pattern_sources(patterns or [])
    quieten()
    from modegpt_graph import api
    from modegpt_graph.report.console import render_analysis
    from modegpt_graph.report.files import write_text
    from modegpt_graph.report.html import to_html
    from modegpt_graph.report.progress import ConsoleProgress

    with ConsoleProgress(messages()) as progress:
        report = api.analyze(
            model,
            patterns=patterns or None,
            approximate_norm=approximate_norm,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    write_json(json_file, report.to_json())
    if html_file is not None:
        write_text(html_file, to_html(report.analysis))
    console = results(json_file)
    bare = _configuration_only(model)
    render_analysis(report.analysis, console, next_step=not bare)
    if bare:
        console.print()
        line = "there are no weights here to compress; name a folder or hub id that has them"
        console.print(Text.assemble(("Next  ", "bold"), line), soft_wrap=True)


def _configuration_only(model: str) -> bool:
    """Whether the name stands for a configuration without weights, which nothing can be compressed of."""
    folder = Path(model)
    if folder.is_dir():
        return not any(folder.glob("*.safetensors"))
    return (architectures_directory() / f"{model}.json").is_file()
