"""Arguments and options that several commands have, said once."""

from pathlib import Path
from typing import Annotated

import typer

from modegpt_graph.commands import checks

CALIBRATION = "Calibration"  # the heading that its options stand under

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
CalibrationText = Annotated[
    str,
    typer.Option(
        "--calib",
        metavar="SOURCE",
        rich_help_panel=CALIBRATION,
        help="wikitext2, alpaca, c4; a .txt, .json, .jsonl or .parquet file; or self: text sampled from the model, "
        "which is also the fallback where the hub is out of reach.",
    ),
]
CalibrationWindows = Annotated[
    int, typer.Option("--calib-windows", metavar="N", rich_help_panel=CALIBRATION, help="Windows of text.")
]
CalibrationWindow = Annotated[
    int, typer.Option("--calib-window", metavar="N", rich_help_panel=CALIBRATION, help="Tokens in each window.")
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
