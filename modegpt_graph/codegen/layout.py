"""How written Python is laid out: how tightly an expression binds, and where a long line is broken."""

from collections.abc import Iterator

WIDEST = 110  # columns of a line of generated code, within its class
_INDENT = 4
SUM, PRODUCT, ATOM = 1, 2, 3
_LEVELS = {"+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT, "@": PRODUCT, "//": PRODUCT, "%": PRODUCT}
_OPEN, _CLOSE = "([{", ")]}"


def _outside(text: str) -> Iterator[tuple[int, str]]:
    """(place, character) of what stands outside of all brackets and strings, the brackets themselves too."""
    depth, quote = 0, ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
            continue
        if character in "\"'":
            quote = character
        if character in _CLOSE:
            depth -= 1
        if depth == 0:
            yield place, character
        if character in _OPEN:
            depth += 1


def binds(text: str) -> int:
    """How tightly an expression holds together: SUM, PRODUCT or ATOM; 0 where that cannot be told."""
    bare = "".join(character for _, character in _outside(text))
    words = bare.split(" ")
    if len(words) == 1 and bare[:1] not in "-(" and "," not in bare:
        return ATOM
    levels = [_LEVELS.get(word, 0) for word in words[1::2]]
    return min(levels) if levels and len(words) % 2 == 1 and all(levels) else 0


def atom(text: str) -> str:
    """An expression that can stand before a dot."""
    return text if binds(text) == ATOM else f"({text})"


def infix(left: str, operator: str, right: str) -> str:
    """`left operator right`, with the brackets that keep their order of evaluation."""
    level = _LEVELS[operator]
    left = left if binds(left) >= level else f"({left})"
    right = right if binds(right) > level else f"({right})"
    return f"{left} {operator} {right}"


def wrapped(line: str, indent: int) -> list[str]:
    """A statement as lines that fit, broken within its longest pair of brackets; `indent` columns stand before it."""
    own = len(line) - len(line.lstrip())
    if len(line) + indent <= WIDEST:
        return [line]
    group = _longest_group(line)
    if group is None:
        return [line]
    start, stop = group
    inner, shift = line[start + 1 : stop], " " * (own + _INDENT)
    if len(shift) + len(inner) + indent <= WIDEST and line.lstrip()[:4] != "def ":
        middle = [f"{shift}{inner}"]
    else:
        middle = []
        for part in _parts(inner):
            middle += wrapped(f"{shift}{part},", indent)
    return [line[: start + 1], *middle, f"{' ' * own}{line[stop:]}"]


def _longest_group(line: str) -> tuple[int, int] | None:
    """Places of the outermost brackets that hold the most."""
    opened: int | None = None
    groups: list[tuple[int, int]] = []
    for place, character in _outside(line):
        if character in _OPEN:
            opened = place
        elif character in _CLOSE and opened is not None:
            groups.append((opened, place))
    return max(groups, key=lambda group: group[1] - group[0], default=None)


def _parts(text: str) -> list[str]:
    """Arguments of a call."""
    parts, start = [], 0
    for place, character in _outside(text):
        if character == ",":
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in [*parts, text[start:].strip()] if part]
