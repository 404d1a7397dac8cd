from pathlib import Path

import pytest

from modegpt_graph.errors import InputError
from modegpt_graph.match.pattern_file import load_pattern, load_patterns

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
        (
            'method = "nystrom"',
            'method = "pruning"',
            14,
            "`decomposition.method` is `pruning`; known: `nystrom`, `cr`, `svd`",
        ),
        ('refit = ["down"]', 'refit = ["dwn"]', 13, "`dwn`, which is no `linear` role; did you mean `down`?"),
        ('select = ["gate", "up", "scale"]', "select = []", 12, "`decomposition.select` has 0 entries; 1 is the least"),
        (
            'scale = "linear"',
            'scale = "linaer"',
            7,
            "`roles.scale` is `linaer`; known: `linear`, `elementwise`, `chain`; did",
        ),
        ("up(x) *", "up(x, y) *", 2, "`up` takes 1 argument, not 2"),
        ("up(x) *", "up(x *", 2, "mine.toml:2:48: expected `)`, found the end"),
        ('name = "three-matrix"', 'name = "Three matrix"', 1, "use at most 64 small letters, digits and hyphens"),
        ('name = "three-matrix"', 'nome = "three-matrix"', 1, "unknown key `nome`; did you mean `name`?"),
        ("[roles]", "[rolls]", 4, "unknown key `rolls`; did you mean `roles`?"),
        ('refit = ["down"]\n', "", 11, "name the matrix that reads the features in `refit`"),
        ('name = "three-matrix"\n', "", 1, "the key `name` is missing"),
        ("act(gate(x))", "act", 2, "mine.toml:2:17: `act` is a role: say what of, as in `act(x)`"),
        ("down(act(gate(x)) * up(x) * scale(x))", "act(gate(x))", 2, "starts with a `linear` role or an operation"),
        ("down(act(gate(x)) * up(x) * scale(x))", "down(x) + x", 2, "starts with a `linear` role or an operation"),
        (
            "act(gate(x))",
            "act(act(gate(x)))",
            2,
            "mine.toml:2:21: `act` is right within `act`, whose kind",
        ),
        ("act(gate(x)) * up(x) * scale", "ACT(gate(x)) * up(x) * scale", 2, "did you mean `act`?"),
        ("up(x) *", "up(x) /", 2, "mine.toml:2:38: unexpected character '/'; a formula is names, brackets, commas"),
        ("up(x) *", "_(x) *", 2, "`_` is anything, and takes nothing in brackets"),
        ("down(act(gate(x)) * up(x) * scale(x))", " ", 2, "the formula is empty"),
        ('act = "elementwise"', 'act = "elementwise"\nmy-role = "linear"', 10, "role `my-role` cannot be written in"),
        ('select = ["gate", "up", "scale"]', 'select = "gate"', 12, "`decomposition.select` is not a list, as in"),
        ("* scale(x)", "* act(x)", 2, "decomposition names `scale`, which is not in this formula"),
        ('refit = ["down"]', "refit = []", 13, "name the matrix that reads the features in `refit`"),
        ('refit = ["down"]', 'refit = ["down", "up"]', 13, "`decomposition.refit` has 2 entries; 1 is the most"),
        ('refit = ["down"]', 'refit = ["up"]', 13, "`up` is both selected and fitted again"),
        ('"up", "scale"]', '"up", "up"]', 12, "`select` names a role twice"),
        ('method = "nystrom"', 'method = "cr"', 14, "`cr` fits nothing again"),
        (
            'act = "elementwise"',
            'act = "elementwise"\nmix = "linear"',
            10,
            "`mix` is an operation; give this role another",
        ),
        ('act = "elementwise"', 'act = "elementwise"\nact = "chain"', 10, "not a TOML file: the key is given twice"),
        ('method = "nystrom"', 'method = "nystrom', 14, "not a TOML file: a text in quotes ends with its line"),
        ('"linear"\ndown', '"linear"\ndown = 3 #', 8, "`roles.down` is `int`; known: `linear`, `elementwise`, `chain`"),
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


VARIANTS = """\
name = "three-matrix"
roles = { gate = "linear", up = "linear", down = "linear", act = "elementwise" }
decomposition = { select = ["gate", "up"], refit = ["down"], method = "nystrom" }

[variants]
first = "down(act(gate(x)) * up(x))"
second = \'\'\'
    down(
        act(up(x)) * gate(x)
    )\'\'\'
"""


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("* gate(x)", "* gate(x", "10:6", "expected `)`, found the end"),
        ("* gate(x)", "* gate(x, x)", "9:22", "`gate` takes 1 argument, not 2"),
        ('up = "linear"', 'up = "linar"', "2", "`roles.up` is `linar`"),
        ('method = "nystrom"', 'methods = "nystrom"', "3", "unknown key `methods`; did you mean `method`?"),
        ("first", "plain", "6", None),
    ],
)
def test_inline_tables_and_long_strings_have_lines_too(
    tmp_path: Path, old: str, new: str, place: str, message: str | None
) -> None:
    assert old in VARIANTS
    path = written(tmp_path, VARIANTS.replace(old, new))
    if message is None:
        assert load_pattern(path).forms()
        return
    with pytest.raises(InputError) as raised:
        load_pattern(path)
    assert str(raised.value).startswith(f"{path}:{place}: {message}")


def test_what_is_no_toml_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a TOML file"):
        load_pattern(written(tmp_path, "name = "))
    with pytest.raises(InputError, match="larger than"):
        load_pattern(written(tmp_path, "#" * 100_000))
    with pytest.raises(InputError, match="cannot be read"):
        load_pattern(tmp_path / "absent.toml")


def test_two_patterns_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text(GOOD, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.toml has a pattern named `three-matrix` too"):
        load_patterns([tmp_path])
