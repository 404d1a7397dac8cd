"""`verify`: the user's own proof that the rewrite changes nothing but the size."""

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modegpt_graph.commands import checks, options
from modegpt_graph.commands.runtime import messages, quieten, results, write_json

if TYPE_CHECKING:
    from modegpt_graph.api import Proof

TOLERANCE = 1e-4
"""float32 over tens of layers moves logits by about 1e-6 of the largest; a wrong rewrite moves them by about 1."""


def verify(
    model: options.Model,
    json_file: options.JsonFile = None,
    seed: options.Seed = 0,
    approximate_norm: options.ApproximateNorm = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Prove the rewrite on your model: every site at full rank, columns shuffled, must change nothing.

    Exit code 1 where a logit moved by more than 1e-4 of the largest, or generation differs.

    [bold]Example[/bold]

    modegpt-graph verify demo
    """
    checks.out_file("--json", json_file)
    quieten()
    from modegpt_graph import api
    from modegpt_graph.report.progress import ConsoleProgress

    with ConsoleProgress(messages()) as progress:
        proof = api.verify(
            model,
            seed=seed,
            approximate_norm=approximate_norm,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    # Not a number is a failure too, and JSON has no word for it.
    holds = proof.max_relative_error <= TOLERANCE and proof.generation_identical is not False
    finite = proof.max_relative_error < float("inf")
    plain = {
        "max_relative_error": proof.max_relative_error if finite else None,
        "generation_identical": proof.generation_identical,
        "sites": proof.sites,
    }
    write_json(json_file, plain)
    _render(proof, holds, results(json_file))
    if not holds:
        raise typer.Exit(1)


def _render(proof: "Proof", holds: bool, console: Console) -> None:
    from modegpt_graph.report import words

    generation = {True: "identical", False: "different", None: "not measured"}[proof.generation_identical]
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    lines.add_row("sites rewritten", f"{proof.sites:,}, at full rank, columns shuffled")
    lines.add_row("largest change", f"{words.figure(proof.max_relative_error)} of the largest logit")
    lines.add_row(
        "greedy generation", f"{generation}, with the cache" if proof.generation_identical is not None else generation
    )
    console.print(lines)
    if holds:
        console.print(Text.assemble(("holds", "bold green"), ": the rewrite changes nothing but the order of sums"))
    else:
        console.print(Text.assemble(("fails", "bold red"), ": the rewrite changes the model; please report it"))
