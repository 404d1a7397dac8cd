"""`bench`: how fast a compressed model reads and writes, beside the one that it was made from."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from modegpt_graph.commands import checks, options
from modegpt_graph.commands.runtime import messages, quieten, results, write_json

if TYPE_CHECKING:
    from modegpt_graph.evaluate import ThroughputComparison

LABELS = {"prefill": "reads a prompt", "decode": "writes new tokens"}


def bench(
    directory: options.CompressedFolder,
    against: Annotated[
        str, typer.Option("--against", metavar="MODEL", help="The model that it was made from.", show_default=False)
    ],
    prompt: Annotated[int, typer.Option("--prompt", metavar="N", help="Tokens that are read in one pass.")] = 512,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", help="Tokens that are written, one at a time.")
    ] = 64,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Each model is measured so often.")] = 5,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure how fast a compressed model is, in turns with the one that it was made from.

    [bold]Example[/bold]

    modegpt-graph bench small --against demo
    """
    for option, value in (("--prompt", prompt), ("--new-tokens", new_tokens), ("--rounds", rounds)):
        checks.at_least(option, value, 1)
    checks.out_file("--json", json_file)
    quieten()
    from modegpt_graph import api
    from modegpt_graph.report.progress import ConsoleProgress

    with ConsoleProgress(messages()) as progress:
        found = api.bench(
            directory,
            against,
            prompt=prompt,
            new_tokens=new_tokens,
            rounds=rounds,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    write_json(json_file, _json(found))
    _draw(found, results(json_file))


def _json(found: "ThroughputComparison") -> dict[str, Any]:
    """Tokens per second of both models, and the compressed one's over the dense one's."""
    dense, compressed = asdict(found.dense), asdict(found.compressed)
    ratios = {"prefill": found.prefill_ratio, "decode": found.decode_ratio}
    return {
        name: {
            "dense_tokens_per_second": dense[name],
            "compressed_tokens_per_second": compressed[name],
            "ratio": ratios[name],
        }
        for name in LABELS
    }


def _draw(found: "ThroughputComparison", console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tokens per second")
    for name in ("dense", "compressed", "ratio"):
        table.add_column(name, justify="right")
    for name, one in _json(found).items():
        table.add_row(
            LABELS[name],
            f"{one['dense_tokens_per_second']:,.1f}",
            f"{one['compressed_tokens_per_second']:,.1f}",
            f"{one['ratio']:.2f}×",
        )
    console.print(table)
