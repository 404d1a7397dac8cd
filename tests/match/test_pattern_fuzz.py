"""A pattern file of a stranger is read or refused in one line: no code runs, nothing loops, nothing grows."""

import random
import string
import tracemalloc
from pathlib import Path

import pytest

from modegpt_graph.errors import InputError
from modegpt_graph.match.pattern_file import LARGEST_FILE, load_pattern

SEED_FILE = Path(__file__).parents[2] / "patterns" / "gated-mlp.toml"
HEAD = 'name = "a"\nroles = { a = "linear", b = "linear" }\n'
TAIL = '\n[decomposition]\nselect = ["b"]\nrefit = ["a"]\nmethod = "nystrom"\n'


def refusal(path: Path, content: bytes | str) -> str | None:
    """What is said against a file, None where it is a pattern. Any other exception is a failure of the test."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        load_pattern(path)
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{path}:"), message
        assert message.isprintable(), "one line, without control characters"
        assert len(message) < len(str(path)) + 400
        return message
    return None


def with_formula(text: str) -> str:
    return f"{HEAD}formula = {text!r}{TAIL}"


@pytest.mark.parametrize(
    "content",
    [
        "a = " + "[" * 30_000,
        "a = " + "{b=" * 15_000,
        ".".join("a" * 20_000) + " = 1",
        "[" + ".".join("a" * 20_000) + "]\n",
        "[[a]]\n" * 10_000,
        "a = " + "9" * 60_000,
        "a = 0x" + "f" * 60_000,
        "a = 1e" + "9" * 60_000,
        f'"{"k" * 60_000}" = 1\n',
        '"two\\nlines \\u001b[31m" = 1\n',
        HEAD + 'formula = "a(b(x))"\n[roles.c]\nd = 1\n' + TAIL,
        HEAD + "".join(f"[variants]\n{n} = 'a(b(x))'\n" for n in range(2)) + TAIL,
        HEAD + "[variants]\n" + "".join(f"v{n} = 'a(b(x))'\n" for n in range(2_000)) + TAIL,
        'name = "a"\nformula = "a(b(x))"\n[roles]\n' + "".join(f"r{n} = 'chain'\n" for n in range(4_000)) + TAIL,
        with_formula("(" * 450 + "x" + ")" * 450),
        with_formula("a(" * 300 + "x" + ")" * 300),
        with_formula("a(b(x))" + " * b(x)" * 9_000),
        with_formula("x" * 60_000),
        with_formula("a(" + "x," * 400 + "x)"),
        with_formula("__import__('os').system('true')"),
        with_formula("a(b.__class__)"),
        b"\xff\xfe\x00",
        b"\x00" * 1_000,
        b"name = '\xed\xa0\x80'",
        "#" * (LARGEST_FILE + 1),
        "",
    ],
    ids=lambda content: repr(content[:24]),
)
def test_bombs_are_refused(tmp_path: Path, content: bytes | str) -> None:
    tracemalloc.start()
    try:
        assert refusal(tmp_path / "bomb.toml", content) is not None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20


def test_what_is_no_file_is_refused_without_reading_it() -> None:
    with pytest.raises(InputError, match="not an ordinary file"):
        load_pattern(Path("/dev/zero"))


def test_files_with_random_damage_are_read_or_refused(tmp_path: Path) -> None:
    generator = random.Random(0)
    seed = SEED_FILE.read_bytes()
    pieces = [
        b"[",
        b"]",
        b"{",
        b"}",
        b"=",
        b'"',
        b"'''",
        b"\n",
        b".",
        b"(",
        b")",
        b"*",
        b"_",
        b"#",
        b"\\u0000",
        b"\xc3",
    ]
    outcomes = []
    for _ in range(1_500):
        damaged = bytearray(seed)
        for _ in range(generator.randrange(1, 6)):
            place = generator.randrange(len(damaged))
            kind = generator.randrange(3)
            if kind == 0:
                damaged[place] = generator.randrange(256)
            elif kind == 1:
                damaged[place:place] = generator.choice(pieces) * generator.randrange(1, 4)
            else:
                del damaged[place : place + generator.randrange(1, 30)]
        outcomes.append(refusal(tmp_path / "damaged.toml", bytes(damaged)))
    assert any(outcome is None for outcome in outcomes)
    assert len({outcome for outcome in outcomes if outcome}) > 100


def test_files_of_random_keys_and_values_are_read_or_refused(tmp_path: Path) -> None:
    generator = random.Random(1)
    keys = ["name", "formula", "variants", "roles", "decomposition", "select", "refit", "method", "a", "'x y'", "é"]
    values = [
        '"a"',
        '"a(b(x))"',
        '["b"]',
        '"nystrom"',
        '{ a = "linear" }',
        "3",
        "-inf",
        "1979-05-27",
        "true",
        "[]",
        "{}",
    ]
    for _ in range(1_500):
        lines = []
        for _ in range(generator.randrange(1, 12)):
            if generator.random() < 0.2:
                lines.append(f"[{'.'.join(generator.choices(keys, k=generator.randrange(1, 3)))}]")
            else:
                lines.append(f"{generator.choice(keys)} = {generator.choice(values)}")
        refusal(tmp_path / "random.toml", "\n".join(lines))


def test_texts_without_any_order_are_refused(tmp_path: Path) -> None:
    generator = random.Random(2)
    for _ in range(500):
        text = "".join(generator.choices(string.printable + "é\u2028\x85", k=generator.randrange(1, 200)))
        assert refusal(tmp_path / "noise.toml", text) is not None
