import random

import pytest

from modegpt_graph.match.formula import (
    DEEPEST_FORMULA,
    LONGEST_FORMULA,
    Apply,
    Combine,
    FormulaError,
    Name,
    applications,
    parse,
)


def test_calls_products_and_sums_nest_as_written() -> None:
    expected = Apply("down", (Combine("*", (Apply("act", (Apply("gate", (Name("x"),)),)), Apply("up", (Name("x"),)))),))
    assert parse("down(act(gate(x)) * up(x))") == expected
    assert parse("a(x) + b(x) * c(x)") == Combine(
        "+", (Apply("a", (Name("x"),)), Combine("*", (Apply("b", (Name("x"),)), Apply("c", (Name("x"),)))))
    )


def test_a_printed_formula_reads_back_as_itself() -> None:
    for text in ("a(b(x) * (c(x) + d(y)) * _)", "output(mix(_, between(value(x))))", "x"):
        assert parse(str(parse(text))) == parse(text)


def test_applications_come_outermost_first() -> None:
    assert [one.name for one in applications(parse("a(b(x) * c(d(x)))"))] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("down(up(x)", 11, "expected `)`, found the end"),
        ("down(up(x)))", 12, "unexpected `)`"),
        ("down(up(x) *)", 13, "expected a name, found `)`"),
        ("down(up(x) - y)", 12, "unexpected character '-'"),
        ("down(3)", 6, "unexpected character '3'"),
        ("", 1, "the formula is empty"),
        ("a b", 3, "unexpected `b`"),
        ("a()", 3, "expected a name, found `)`"),
        ("__import__('os')", 12, 'unexpected character "\'"'),
    ],
)
def test_an_error_says_where_it_is(text: str, column: int, message: str) -> None:
    with pytest.raises(FormulaError) as raised:
        parse(text)
    said = str(raised.value).removesuffix("; a formula is names, brackets, commas, `*` and `+`")
    assert (raised.value.column, said) == (column, message)


def test_length_and_depth_are_bounded() -> None:
    with pytest.raises(FormulaError, match="longer than"):
        parse("x" * (LONGEST_FORMULA + 1))
    with pytest.raises(FormulaError, match="nested deeper"):
        parse("(" * (DEEPEST_FORMULA + 1) + "x" + ")" * (DEEPEST_FORMULA + 1))
    assert parse("(" * DEEPEST_FORMULA + "x" + ")" * DEEPEST_FORMULA) == Name("x")


def test_any_text_is_read_or_refused() -> None:
    """Random texts of the language's own characters: no other exception, no endless loop, nothing executed."""
    generator = random.Random(0)
    pieces = ["a", "b", "_", "(", ")", "*", "+", ",", " ", "\n", "exec", "__class__", ".", "[", "'", "0", "é", "\x00"]
    read, columns = 0, []
    for _ in range(3000):
        text = "".join(generator.choices(pieces, k=generator.randrange(40)))
        try:
            parse(text)
            read += 1
        except FormulaError as error:
            columns.append((error.column, len(text) + 1))
    assert read > 20
    assert all(1 <= column <= last for column, last in columns)
