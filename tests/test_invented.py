"""Blocks that no built-in pattern knows, compressed by a few lines of TOML: from the command line to a loaded model."""

from pathlib import Path

import pytest
import torch
from fixtures import invented

import modegpt_graph as mg
from modegpt_graph import cli
from modegpt_graph.api import check_pattern, compress
from modegpt_graph.models import forward_logits

FIXTURE = Path(__file__).parent / "fixtures" / "invented.py"
THREE = """\
name = "scaled-mlp"
formula = "down(act(gate(x)) * up(x) * scale(x))"
roles = { gate = "linear", up = "linear", scale = "linear", down = "linear", act = "elementwise" }

[decomposition]
select = ["gate", "up", "scale"]
refit = ["down"]
method = "nystrom"
"""
SUMMED = """\
name = "summed-mlp"
formula = "down(straight(x) + first(left(x)) * second(right(x)))"

[roles]
left = "linear"
right = "linear"
straight = "linear"
down = "linear"
first = "elementwise"
second = "elementwise"

[decomposition]
select = ["left", "right", "straight"]
refit = ["down"]
method = "nystrom"
"""
GATED = """\
name = "gated-attention"
formula = "output(act(gate(x)) * mix(_, between(value(x))))"
roles = { value = "linear", gate = "linear", output = "linear", between = "chain", act = "elementwise" }

[decomposition]
select = ["value", "gate"]
refit = ["output"]
method = "nystrom"
"""
NORMED = """\
name = "normed-mlp"
formula = "down(between(up(x)))"
roles = { up = "linear", down = "linear", between = "chain" }

[decomposition]
select = ["up"]
refit = ["down"]
method = "nystrom"
"""


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        return int(end.value.code or 0), capsys.readouterr().out

    return call


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("factory", "text", "kept"),
    [("three_matrices", THREE, "gate"), ("summed", SUMMED, "straight"), ("gated_attention", GATED, "gate")],
)
def test_from_a_pattern_file_to_a_loaded_model(tmp_path: Path, factory: str, text: str, kept: str) -> None:
    file = written(tmp_path, text)
    tokens = torch.randint(0, invented.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    where = f"{FIXTURE}:{factory}"
    result = compress(where, 0.2, patterns=[file], calibration=tokens, allocator="uniform", evaluate=False)
    found = [site for site in result.report.sites if kept in site.roles and site.pattern in text]
    assert len(found) == 2
    assert all((site.decomposition, site.certificate.holds) == ("nystrom", True) for site in found)
    result.save(tmp_path / "small")
    loaded = mg.load(tmp_path / "small", factory=where)
    with torch.no_grad():
        assert torch.equal(forward_logits(loaded, tokens), forward_logits(result.model, tokens))
    for site in found:
        before = dict(getattr(invented, factory)()[0].named_parameters())[site.roles[kept].parameter]
        assert loaded.get_parameter(site.roles[kept].parameter).shape[0] < before.shape[0]


def test_the_commands_of_the_walk_through(run, tmp_path: Path) -> None:
    written(tmp_path, THREE)
    where = f"{FIXTURE}:three_matrices"
    code, out = run("patterns", "check", "mine.toml", where)
    assert code == 0
    assert "It meets 2 sites" in out
    assert "Nyström  layers 0-1" in out
    code, out = run("compress", where, "--patterns", "mine.toml", "--ratio", 0.3, "--calib", "self", "--out", "small")
    assert code == 0
    assert "gate, up, scale / down" in out
    model = mg.load("small", factory=where)
    assert model.get_parameter("blocks.0.mlp.scale.weight").shape[0] < invented.HIDDEN


def test_without_the_pattern_the_matrices_are_left_with_the_nearest_one_named(run) -> None:
    code, out = run("analyze", f"{FIXTURE}:three_matrices")
    assert code == 0
    assert "nearest pattern gated-mlp" in out
    assert "expected a product of 2, found a product of 3 in" in out


def test_a_near_miss_says_where_it_stopped_and_how_far_it_had_got(run, tmp_path: Path) -> None:
    written(tmp_path, THREE.replace("* scale(x)", "* act(scale(x))"))
    code, out = run("patterns", "check", "mine.toml", f"{FIXTURE}:three_matrices")
    assert code == 1
    assert "It meets nothing in" in out
    assert "blocks.0.mlp.down.weight  and 1 other place, for the same reason" in out
    assert "Expected an element-wise function (`act`), found the matrix `blocks.0.mlp." in out
    assert "`blocks.0.mlp.scale` (invented.py:" in out or "`blocks.0.mlp.up` (invented.py:" in out
    assert "5 of 7 steps had matched, with `down`, `gate`, `up`" in out
    assert "14 other places matched no more than the first step." in out


@pytest.mark.parametrize(
    ("factory", "text", "reason"),
    [
        (
            "three_matrices",
            THREE.replace("nystrom", "svd"),
            "`svd` claims that any mixing of the features passes through unchanged, but silu and mul treat each",
        ),
        (
            "normed",
            NORMED,
            "the norm `norm` (layer_norm over the 80 features): every feature depends on the others",
        ),
    ],
    ids=["mixing", "dropping"],
)
def test_a_claim_that_is_refuted_is_refused_with_a_counterexample(
    tmp_path: Path, factory: str, text: str, reason: str
) -> None:
    meeting = check_pattern(written(tmp_path, text), f"{FIXTURE}:{factory}")
    assert len(meeting.sites) == 2
    for site in meeting.sites:
        assert site.decomposition is None
        assert site.reason.startswith("refused: ")
        assert "; found: " in site.reason
        assert reason in site.reason


def test_the_counterexample_is_a_number_that_changed(run, tmp_path: Path) -> None:
    written(tmp_path, NORMED)
    code, out = run("patterns", "check", "mine.toml", f"{FIXTURE}:normed")
    assert code == 1
    assert "refused  layers 0-1" in out
    assert "with feature 0 set to zero, feature" in " ".join(out.split())


def test_a_pattern_of_a_built_in_name_takes_its_place(tmp_path: Path) -> None:
    text = NORMED.replace("normed-mlp", "gated-mlp")
    from modegpt_graph.match.prepare import read_patterns

    patterns = read_patterns([written(tmp_path, text)])
    (own,) = [pattern for pattern in patterns if pattern.name == "gated-mlp"]
    assert own.formula == "down(between(up(x)))"
