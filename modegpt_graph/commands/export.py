"""`export`: a compressed model in another format."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from modegpt_graph.commands import checks, options
from modegpt_graph.commands.runtime import messages, quieten, results


def export(
    directory: options.CompressedFolder,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FORMAT", help="torch-export: a program of torch.export (.pt2).", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="New file.", show_default=False)],
    factory: Annotated[
        str | None,
        typer.Option(
            "--factory",
            metavar="FILE.py:NAME",
            help="What made the original, where that is not from transformers.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write a compressed model as one program that needs only torch, and check that it gives the same logits.

    It takes token ids, batches of any size and length, and gives logits; it keeps no cache.

    [bold]Example[/bold]

    modegpt-graph export small --to torch-export --out small.pt2
    """
    checks.new_file("--out", out)
    quieten()
    from modegpt_graph import api
    from modegpt_graph.report import words
    from modegpt_graph.report.progress import ConsoleProgress

    with ConsoleProgress(messages()) as progress:
        program = api.export(directory, to, out, factory, trust_remote_code=trust_remote_code, progress=progress)
    batch, length = program.shape
    error = program.max_relative_error
    moved = f"logits within {words.figure(error)} of the largest" if error else "the very same logits"
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column(overflow="fold")
    lines.add_row("written", Text(f"{out}, {words.byte_count(program.bytes)}"))
    lines.add_row("checked", f"{words.plural(batch, 'sequence')} of {words.plural(length, 'token')}: {moved}")
    lines.add_row("to run it", Text(f'torch.export.load("{out}").module()(token_ids)', "cyan"))
    results().print(lines)
