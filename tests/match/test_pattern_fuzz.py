"""A pattern file of a stranger is read or refused in one line: no code runs, nothing loops, nothing grows."""

import os
import random
import string
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modegpt_graph.errors import InputError
from modegpt_graph.match.meeting import meet
from modegpt_graph.match.pattern_file import LARGEST_FILE, load_pattern
from modegpt_graph.models import resolve

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


def test_what_is_no_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    for name, message in (("zero", "ordinary file"), ("loop", "cannot be read"), ("pipe", "ordinary file")):
        with pytest.raises(InputError, match=message):
            load_pattern(tmp_path / f"{name}.toml")


@pytest.mark.parametrize("written", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_how_an_editor_ends_and_starts_files_changes_nothing(tmp_path: Path, written: Callable[[str], str]) -> None:
    text = SEED_FILE.read_text(encoding="utf-8")
    assert refusal(tmp_path / "file.toml", written(text)) is None
    assert load_pattern(tmp_path / "file.toml") == load_pattern(SEED_FILE)
    wrong = text.replace("down(act(gate(x))", "down(acct(gate(x))")
    before = wrong[: wrong.index("acct")]
    place = f"{before.count(chr(10)) + 1}:{len(before.rpartition(chr(10))[2]) + 1}"
    said = refusal(tmp_path / "file.toml", written(wrong))
    assert said is not None
    assert f"file.toml:{place}: `acct` is neither" in said, said


def test_many_orders_of_many_products_are_given_up(tmp_path: Path) -> None:
    """A product of six sums of six, whose last part is never there: 720 orders of 720 orders of each sum."""
    names = [f"r{number}" for number in range(36)]
    sums = [" + ".join(f"{name}(x)" for name in names[first : first + 6]) for first in range(0, 36, 6)]
    sums[-1] = sums[-1].replace("r35(x)", "r35(never(x))")
    roles = "".join(f'{name} = "linear"\n' for name in ["down", *names])
    (tmp_path / "orders.toml").write_text(
        f'name = "orders"\nformula = "down({" * ".join(f"({one})" for one in sums)})"\n'
        f'[roles]\nnever = "elementwise"\n{roles}'
        '[decomposition]\nselect = ["r0"]\nrefit = ["down"]\nmethod = "nystrom"\n'
    )
    source = resolve(SumsOfProducts(), example_inputs=(torch.arange(5)[None],))
    meeting = meet(source, load_pattern(tmp_path / "orders.toml"))
    assert meeting.sites == ()
    assert any("steps had matched" in str(one.miss) for one in meeting.misses)


class SumsOfProducts(nn.Module):
    """Reads tokens, multiplies six sums of six products with matrices, and projects."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.down = nn.Embedding(16, 4), nn.Linear(6, 4)
        self.parts = nn.ModuleList(nn.Linear(4, 6) for _ in range(36))
        self.head = nn.Linear(4, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        values = [part(x) for part in self.parts]
        product = x
        for first in range(0, 36, 6):
            total = values[first]
            for value in values[first + 1 : first + 6]:
                total = total + value
            product = total if first == 0 else product * total
        return self.head(x + self.down(product))


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
