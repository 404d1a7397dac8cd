"""The command line: commands, and how each error becomes one line and an exit code."""

import io
import re
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from modegpt_graph.commands import runtime
from modegpt_graph.commands.analyze import analyze
from modegpt_graph.commands.bench import bench
from modegpt_graph.commands.compare import compare
from modegpt_graph.commands.compress import compress
from modegpt_graph.commands.evaluate import evaluate
from modegpt_graph.commands.explain import explain
from modegpt_graph.commands.export import export
from modegpt_graph.commands.patterns import check, list_patterns
from modegpt_graph.commands.verify import verify
from modegpt_graph.errors import ModegptError

PROGRAM = "modegpt-graph"
NUMBERS = {"number": "this is no number", "integer": "this is no whole number"}
EXIT_CODES = "Exit codes: 0 done, 1 the work failed, 2 bad usage or bad input."

app = typer.Typer(
    name=PROGRAM,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in (
    ("analyze", analyze),
    ("compress", compress),
    ("verify", verify),
    ("eval", evaluate),
    ("compare", compare),
    ("bench", bench),
    ("export", export),
    ("explain", explain),
):
    app.command(name, epilog=EXIT_CODES)(command)
patterns = typer.Typer(help="Pattern files: what is looked for in a model's graph.", no_args_is_help=False)
patterns.command("list", epilog=EXIT_CODES)(list_patterns)
patterns.command("check", epilog=EXIT_CODES)(check)
app.add_typer(patterns, name="patterns", epilog=EXIT_CODES)


def _version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        try:
            number = importlib.metadata.version(PROGRAM)
        except importlib.metadata.PackageNotFoundError:
            number = "(run from a source tree that is not installed)"
        typer.echo(f"{PROGRAM} {number}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog=EXIT_CODES)
def program(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make a decoder language model smaller, without training, and say why each step is sound.

    [bold]Start here[/bold]

    modegpt-graph analyze demo

    modegpt-graph compress demo --ratio 0.3 --out small
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave with its exit code. `--debug` is understood anywhere before `--`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    runtime.debugging = "--debug" in words[:end]
    words = [word for index, word in enumerate(words) if word != "--debug" or index >= end]
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a failure.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(_run(words))


def _run(arguments: list[str]) -> int:
    try:
        return app(arguments, prog_name=PROGRAM, standalone_mode=False) or 0
    except ModegptError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except Exception as error:
        if runtime.debugging:
            raise
        if hasattr(error, "format_message"):
            return _usage(error)
        return _fail(f"{type(error).__name__}: {error}; this is a bug; run with --debug for the traceback", 1)


def _usage(error: Exception) -> int:
    """Bad usage, as the parser tells it: one line, and where to read on."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else PROGRAM
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    message = message.replace("Value error, ", "")
    message = re.sub(r"Input should be a valid (\w+).*", lambda found: NUMBERS.get(found[1], found[0]), message)
    return _fail(f"{message}; see {path} --help", getattr(error, "exit_code", 2))


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return exit_code
