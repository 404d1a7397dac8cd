"""What the README tells a person to type is there, is understood, and runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from modegpt_graph.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST = "pip install . && modegpt-graph compress demo --ratio 0.3 --out small"
TESTS = "pip install -e '.[test]' && pytest -q -n 2 --dist loadfile"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def command_lines() -> list[list[str]]:
    """The words after `modegpt-graph` of every command in a shell block, and in running text."""
    shell = [command for block in blocks("bash") for line in block.splitlines() for command in line.split("&&")]
    inline = re.findall(r"`(modegpt-graph [^`]+)`", README)
    words = [shlex.split(line, comments=True) for line in [*shell, *inline]]
    return [line[1:] for line in words if line and line[0] == "modegpt-graph"]


def test_the_two_commands_stand_alone_word_for_word() -> None:
    assert [block.strip() for block in blocks("bash")[:2]] == [FIRST, TESTS]


def test_the_test_command_is_the_one_that_is_run_on_every_commit() -> None:
    assert TESTS in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_every_command_is_understood(words: list[str]) -> None:
    """Parsed, types and all, and not run."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("modegpt-graph", list(words))
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        _, command, rest = command.resolve_command(context, rest)
        context = command.make_context(command.name, rest, parent=context)


def test_there_are_commands_to_understand() -> None:
    assert {words[0] for words in command_lines()} >= {"analyze", "compress", "verify", "eval", "explain", "patterns"}


def test_the_python_example_runs(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model in place of those it names."""
    (example,) = blocks("python")
    assert "import modegpt_graph as mg" in example
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(re.sub(r'"(opt-125m|demo)"', repr(str(tiny_folder)), example), names)
    assert names["report"].coverage == 1.0
    assert names["result"].report.outcome.ratios.decoder_linear == pytest.approx(0.3, abs=0.005)
    assert names["proof"].generation_identical
    assert callable(names["model"].generate)
    assert (tmp_path / "small" / "report.json").is_file()


def test_every_pattern_shown_is_one_that_is_read(tmp_path: Path) -> None:
    from modegpt_graph.match.pattern_file import load_patterns

    for number, block in enumerate(blocks("toml")):
        (tmp_path / f"{number}.toml").write_text(block)
        (pattern,) = load_patterns([tmp_path / f"{number}.toml"])
        assert pattern.name in block


def test_every_allocator_preset_budget_and_method_is_named() -> None:
    from modegpt_graph.methods.names import METHODS
    from modegpt_graph.rewrite.costs import BUDGETS
    from modegpt_graph.rewrite.presets import PRESETS
    from modegpt_graph.rewrite.ranks import ALLOCATORS

    for name in (*ALLOCATORS, *PRESETS, *BUDGETS, *METHODS):
        assert re.search(rf"`(?:--preset )?{name}`", README) or name in ("default", "parameters"), name


@pytest.mark.parametrize("place", re.findall(r"`((?:[\w.]+/)+)`", README))
def test_every_folder_named_is_there(place: str) -> None:
    assert (ROOT / place).is_dir()
