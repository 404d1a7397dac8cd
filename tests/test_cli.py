"""Each way to call the program wrongly gives one line and an exit code, before any work and leaving nothing behind."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from modegpt_graph import cli
from modegpt_graph.commands import runtime
from modegpt_graph.errors import ModegptError
from modegpt_graph.report.schema import to_json

COMMANDS = ("analyze", "compress", "verify", "eval", "compare", "bench", "export", "explain", "patterns")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the program in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(runtime, "debugging", False)
    environment = dict(os.environ)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    # The program sets up a process that ends with it; the other tests must not inherit that.
    with warnings.catch_warnings():
        yield call
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]


@pytest.fixture
def samples():
    path = Path(__file__).parent / "report" / "samples.py"
    spec = importlib.util.spec_from_file_location("report_samples", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMPRESS = ("compress", "demo", "--out", "small", "--ratio")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*COMPRESS, "0"), "--ratio 0 is outside (0, 0.95]"),
        ((*COMPRESS, "-0.1"), "--ratio -0.1 is outside"),
        ((*COMPRESS, "0.951"), "--ratio 0.951 is outside"),
        ((*COMPRESS, "30"), "did you mean 0.3?"),
        ((*COMPRESS, "nan"), "--ratio nan is outside"),
        ((*COMPRESS, "much"), "Invalid value for '--ratio'"),
        ((*COMPRESS, "0.3", "--calib", "texts.txt"), "--calib texts.txt: there is no such file"),
        ((*COMPRESS, "0.3", "--calib", "no/such/file.jsonl"), "there is no such file"),
        ((*COMPRESS, "0.3", "--calib", ""), "--calib is empty"),
        ((*COMPRESS, "0.3", "--calib", "empty.txt"), "--calib empty.txt is empty"),
        ((*COMPRESS, "0.3", "--calib", "full"), "--calib full is a folder"),
        ((*COMPRESS, "0.3", "--calib", "full/model.bin"), "the kinds of file read are .txt"),
        ((*COMPRESS, "0.3", "--calib-windows", "0"), "--calib-windows 0 is too small"),
        ((*COMPRESS, "0.3", "--calib-window", "1"), "--calib-window 1 is too small"),
        (
            (*COMPRESS, "0.3", "--allocator", "fair"),
            "'fair' is not one of 'curves', 'block-influence', 'split-influence', 'owl'",
        ),
        ((*COMPRESS, "0.3", "--dtype", "int8"), "'int8' is not one of"),
        ((*COMPRESS, "0.3", "--calib", "banana"), "nor a known data set; known names: wikitext2, alpaca, c4"),
        ((*COMPRESS, "0.3", "--seed", "-1"), "--seed -1 is outside 0 to 2^63 - 1"),
        ((*COMPRESS, "0.3", "--seed", "1" * 30), "is outside 0 to 2^63 - 1"),
        ((*COMPRESS, "0.3", "--seed", "x"), "Invalid value for '--seed': this is no whole number; see"),
        ((*COMPRESS, "0.3", "--context", "0"), "--context 0 is too small"),
        ((*COMPRESS, "0.3", "--budget", "watts"), "Invalid value for '--budget': 'watts' is not one of 'parameters'"),
        ((*COMPRESS, "0.3", "--preset", "papr"), "'papr' is not one of 'default', 'paper'"),
        ((*COMPRESS, "0.3", "--target-size", "1MB"), "--ratio and --target-size exclude each other"),
        ((*COMPRESS[:-1], "--target-size", "small"), "'small' is no size; write 100MB"),
        ((*COMPRESS[:-1], "--target-size", "0"), "a size of 0 bytes is too small"),
        ((*COMPRESS[:-1], "--max-perplexity-increase", "10"), "write 10% for 10 in a hundred"),
        ((*COMPRESS[:-1], "--max-perplexity-increase", "0"), "an increase of 0 is outside (0, 100)"),
        ((*COMPRESS[:-1], "--max-perplexity-increase", "lots"), "'lots' is no share; write 10% or 0.1"),
        ((*COMPRESS, "0.3", "--patterns", "bad.toml"), "bad.toml:1: the key `roles` is missing"),
        ((*COMPRESS, "0.3", "--json", "no/report.json"), "there is no folder no; make it first"),
        ((*COMPRESS, "0.3", "--json", "full"), "--json full is a folder"),
        ((*COMPRESS, "0.3", "--json", "empty.txt/a.json"), "there is no folder empty.txt"),
        ((*COMPRESS, "0.3", "--patterns", "none.toml"), "--patterns none.toml: there is no such file or folder"),
        ((*COMPRESS, "0.3", "--patterns", "full"), "there is no .toml file in this folder"),
        ((*COMPRESS, "0.3", "--patterns", "empty.txt"), "a pattern file ends in .toml"),
        (("compress", "demo", "--ratio", "0.3", "--out", "full"), "--out full exists and is not empty"),
        (("compress", "demo", "--ratio", "0.3", "--out", "empty.txt"), "--out empty.txt is not a folder"),
        (("compress", "demo", "--ratio", "0.3", "--out", "empty.txt/a"), "--out empty.txt/a cannot be written"),
        (("compress", "demo", "--ratio", "0.3"), "Missing option '--out'; see modegpt-graph compress --help"),
        (("compress",), "Missing argument 'MODEL'"),
        (("analyze", "demo", "--html", "no/report.html"), "--html no/report.html: there is no folder no"),
        (("analyze", "demo", "--json", "/dev/null"), "is not an ordinary file; '-' writes to standard output"),
        (("analyse", "demo"), "Did you mean 'analyze'?"),
        (("analyze", "demo", "--colour"), "No such option: --colour"),
        (("eval", "demo"), "nothing to evaluate on: give --text, --tasks, or both"),
        (("eval", "demo", "--tasks", "no.jsonl"), "--tasks no.jsonl: there is no such file"),
        (("eval", "demo", "--tasks", "empty.txt"), "--tasks empty.txt: a task is a .jsonl file"),
        (("eval", "demo", "--text", "no.txt"), "--text no.txt: there is no such file"),
        (("eval", "demo", "--text", "wikitext2", "--windows", "0"), "--windows 0 is too small"),
        (("compare", "demo", "--methods", "ours,slice-gpt"), "there is no method 'slice-gpt'; did you mean slicegpt?"),
        (("compare", "demo", "--methods", "best"), "there is no method 'best'; known: ours, paper"),
        (("compare", "demo", "--methods", ","), "--methods names none"),
        (("compare", "demo", "--ratios", "0.2,much"), "--ratios: 'much' is no number"),
        (("compare", "demo", "--ratios", "0.2,30"), "--ratios 30 is outside (0, 0.95]; did you mean 0.3?"),
        (("compare", "demo", "--text", "no.txt"), "--text no.txt: there is no such file"),
        (("compare", "demo", "--calib", "no.txt"), "--calib no.txt: there is no such file"),
        (("explain", "nowhere"), "there is no folder nowhere"),
        (("explain", "full"), "full has no report.json; name a folder that compress wrote"),
        (("patterns",), "Missing command"),
        (("patterns", "check", "none.toml"), "there is no such file"),
        (("patterns", "check", "full"), "full is a folder"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_bad_usage_is_one_line_exit_code_2_and_leaves_nothing(run, tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.bin").write_bytes(b"x")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.toml").write_text('name = "bad"\n')
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*arguments)
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert (code, out) == (2, "")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_for_out_is_fine_and_nothing_is_left_in_it(tmp_path):
    from modegpt_graph.commands.checks import out_directory

    out_directory(tmp_path)
    out_directory(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []


def test_explain_draws_a_saved_report_again(run, tmp_path, samples):
    analysis = samples.analysis()
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "report.json").write_text(json.dumps(to_json(analysis, samples.outcome(analysis))))
    code, out, err = run("explain", "small", "--html", "report.html")
    assert (code, err) == (0, "")
    assert "blocks of 2" in out
    assert "17.79" in out
    assert "Next" not in out
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "it holds a list"), ('{"schema_version": 2}', "not a report of this version")],
)
def test_explain_says_what_is_wrong_with_a_report(run, tmp_path, text, message):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "report.json").write_text(text)
    code, out, err = run("explain", "small")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_patterns_are_listed_with_their_formulas(run):
    code, out, _ = run("patterns", "list")
    assert code == 0
    assert "down(act(gate(x)) * up(x))" in out
    assert "Nyström on gate, up" in out


def test_a_pattern_file_is_checked(run, tmp_path):
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nformula = "down(up(x))"\n[roles]\nup = "linear"\ndown = "linear"\n'
        '[decomposition]\nselect = ["up"]\nrefit = ["down"]\nmethod = "nystrom"\n'
    )
    code, out, err = run("patterns", "check", "mine.toml")
    assert (code, err) == (0, "")
    assert "The file is sound." in out
    (tmp_path / "mine.toml").write_text('name = "mine"\ncolour = "red"\n')
    code, out, err = run("patterns", "check", "mine.toml")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ModegptError("layer 7:\n overflow"), 1, "error: layer 7: overflow\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (KeyError("x"), 1, "error: KeyError: 'x'; this is a bug; run with --debug for the traceback\n"),
    ],
)
def test_what_goes_wrong_inside_is_one_line_too(run, monkeypatch, error, code, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert run("analyze", "demo") == (code, "", line)


def test_debug_shows_the_traceback_wherever_it_stands(run, monkeypatch):
    seen = []

    def fail(arguments, **_):
        seen.append(arguments)
        raise KeyError("x")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(KeyError):
        run("analyze", "demo", "--debug")
    assert seen == [["analyze", "demo"]]


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_names_examples_and_exit_codes(run, command):
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert "Exit codes: 0 done, 1 the work failed, 2 bad usage or bad input." in out
    assert command == ("patterns",) or f"modegpt-graph {' '.join(command)}" in out
    assert "\x1b" not in out


def test_help_loads_no_heavy_library():
    heavy = ("torch", "transformers", "datasets", "networkx", "numpy")
    code = (
        "import sys\nfrom modegpt_graph.cli import main\ntry:\n    main(['compress', '--help'])\n"
        f"except SystemExit:\n    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_module_is_the_program():
    done = subprocess.run([sys.executable, "-m", "modegpt_graph", "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: No such option: --nonsense; see modegpt-graph --help\n"


def test_no_command_shows_the_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(name in out for name in COMMANDS)
