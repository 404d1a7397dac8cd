from pathlib import Path

import pytest

from modegpt_graph.errors import InputError
from modegpt_graph.match.patterns import load_pattern, load_patterns

GOOD = """\
name = "three-matrix"
formula = "down(act(gate(x)) * up(x) * scale(x))"

[roles]
gate = "linear"
up = "linear"
scale = "linear"
down = "linear"
act = "elementwise"

[decomposition]
select = ["gate", "up", "scale"]
refit = ["down"]
method = "nystrom"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_ten_line_file_is_a_pattern(tmp_path: Path) -> None:
    pattern = load_pattern(written(tmp_path, GOOD))
    assert pattern.name == "three-matrix"
    assert list(pattern.forms()) == ["plain"]
    assert pattern.decomposition.select == ("gate", "up", "scale")


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("formula =", "formular =", 2, "unknown key `formular`; did you mean `formula`?"),
        ('act = "elementwise"', 'act = "elementwise"\nspare = "linear"', 10, "role `spare` is never used"),
        ("act(gate", "acct(gate", 2, "`acct` is neither a role nor an operation; did you mean `act`?"),
        ("down(act", "mixx(act", 2, "did you mean `mix`?"),
        ('method = "nystrom"', 'method = "pruning"', 14, "`decomposition.method`"),
        ('refit = ["down"]', 'refit = ["dwn"]', 13, "`dwn`, which is no `linear` role; did you mean `down`?"),
        ('select = ["gate", "up", "scale"]', "select = []", 12, "`decomposition.select`"),
        ('scale = "linear"', 'scale = "matrix"', 7, "`roles.scale`"),
        ("up(x) *", "up(x, y) *", 2, "`up` takes 1 argument, not 2"),
        ("up(x) *", "up(x *", 2, "expected ')'"),
        ('name = "three-matrix"', 'name = "Three matrix"', 1, "`name`"),
    ],
)
def test_an_error_names_its_line(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(InputError) as raised:
        load_pattern(path)
    text = str(raised.value)
    assert text.startswith(f"{path}:{line}:"), text
    assert message in text
    assert "\n" not in text


def test_an_unreadable_variant_is_named_by_its_line(tmp_path: Path) -> None:
    text = GOOD.replace("formula =", '[variants]\nfirst = "down(gate(x))"\nsecond =').replace("up(x) *", "up(x *")
    text = text.replace('name = "three-matrix"\n', 'name = "three-matrix"\n\n')
    path = written(tmp_path, text)
    with pytest.raises(InputError) as raised:
        load_pattern(path)
    line = next(number for number, one in enumerate(text.splitlines(), 1) if one.startswith("second"))
    assert str(raised.value).startswith(f"{path}:{line}:")


def test_what_is_no_toml_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a TOML file"):
        load_pattern(written(tmp_path, "name = "))
    with pytest.raises(InputError, match="larger than"):
        load_pattern(written(tmp_path, "#" * 100_000))
    with pytest.raises(InputError, match="cannot be read"):
        load_pattern(tmp_path / "absent.toml")


def test_deeply_nested_toml_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a TOML file"):
        load_pattern(written(tmp_path, "name = " + "[" * 20_000))


def test_two_patterns_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text(GOOD, encoding="utf-8")
    with pytest.raises(InputError, match="`three-matrix` was read already"):
        load_patterns([tmp_path])
