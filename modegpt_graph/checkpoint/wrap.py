"""Long lines of generated Python, broken as a formatter would break them."""

LINE_LENGTH = 120
INDENT = "    "
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def wrap(source: str, width: int = LINE_LENGTH) -> str:
    """The same Python with no line over `width` where its outermost brackets allow that.

    The meaning does not change: lines that are only part of a statement, and comprehensions, stay as they are.
    """
    return "\n".join(part for line in source.splitlines() for part in _wrap_line(line, width))


def _wrap_line(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    pair = _outermost(line)
    if pair is None:
        return [line]
    opened, closed = pair
    indent = line[: len(line) - len(line.lstrip())]
    head, inner, tail = line[: opened + 1], line[opened + 1 : closed], line[closed:]
    together = f"{indent}{INDENT}{inner}"
    if len(together) <= width and len(tail) + len(indent) <= width and not _is_definition(line):
        return [head, together, f"{indent}{tail}"]
    if " for " in inner:
        return [line]
    items = _items(inner)
    # A comma after a single item would make a tuple of it, unless it is one already.
    comma = "," if len(items) > 1 or inner.rstrip().endswith(",") else ""
    broken = [part for item in items for part in _wrap_line(f"{indent}{INDENT}{item}{comma}", width)]
    return [head, *broken, f"{indent}{tail}"]


def _is_definition(line: str) -> bool:
    return line.lstrip().startswith(("def ", "class "))


def _outermost(line: str) -> tuple[int, int] | None:
    """Places of the widest bracket pair that is within no other and holds something."""
    pairs, stack = [], []
    for place, sign in _signs(line):
        if sign in _CLOSING:
            stack.append(place)
        elif sign in _CLOSING.values():
            if not stack:
                return None
            opened = stack.pop()
            if not stack and place - opened > 1:
                pairs.append((opened, place))
    return max(pairs, key=lambda pair: pair[1] - pair[0], default=None)


def _items(inner: str) -> list[str]:
    """The items between the commas that stand within no bracket."""
    depth, start, found = 0, 0, []
    for place, sign in _signs(inner):
        depth += (sign in _CLOSING) - (sign in _CLOSING.values())
        if sign == "," and depth == 0:
            found.append(inner[start:place].strip())
            start = place + 1
    return [item for item in (*found, inner[start:].strip()) if item]


def _signs(text: str) -> list[tuple[int, str]]:
    """Places of the brackets and commas that are not within a string."""
    found, quote, place = [], "", 0
    while place < len(text):
        sign = text[place]
        if quote:
            place += sign == "\\"
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "([{}]),":
            found.append((place, sign))
        place += 1
    return found
