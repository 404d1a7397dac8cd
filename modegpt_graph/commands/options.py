"""Arguments and options that several commands have, said once."""

from pathlib import Path
from typing import Annotated

import typer

from modegpt_graph.commands import checks

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, folder, .gguf file, name in architectures/, FILE.py:factory, or demo.",
        show_default=False,
    ),
]
CompressedFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder that compress wrote.", show_default=False)
]
Patterns = Annotated[
    list[Path] | None,
    typer.Option("--patterns", metavar="FILE|DIR", help="Pattern files, tried before the built-in ones; repeatable."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is standard output.")
]
HtmlFile = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML file.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Off unless you ask.")
]
ApproximateNorm = Annotated[
    bool,
    typer.Option(
        "--approximate-norm",
        help="Take queries and keys under a norm of each head too, by an approximation whose error is measured.",
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", callback=checks.seed, help="For everything random: same seed, same result."),
]
