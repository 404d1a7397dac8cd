"""Pattern files: TOML, one pattern each. Read with bounds, and with errors that name the line."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modegpt_graph.errors import InputError
from modegpt_graph.match.patterns import Decomposition, Pattern, PatternError, shown, suggestion

LARGEST_FILE = 64 * 1024
_SAID = {
    r"Illegal character '\n'": "a text in quotes ends with its line; close the quotes",
    "Cannot overwrite a value": "the key is given twice",
}  # of the TOML parser's messages, what a person needs to read instead
_WRITTEN = {
    "tuple_type": 'a list, as in ["up", "gate"]',
    "mapping_type": "a table of named entries",
    "dict_type": "a table of named entries",
    "model_type": "a table of named entries",
    "string_type": "a text in quotes",
}
MOST_DOTS = 256  # in a line: the parser keeps every beginning of a dotted key, which grows with the square of its parts


def load_pattern(path: Path) -> Pattern:
    """Read one pattern file. Raises InputError that names file, line and what is wrong."""
    text = _read(path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}{_toml_place(error, text)}") from error
    except RecursionError as error:
        raise InputError(f"{path}:1: not a pattern: brackets within brackets, hundreds of levels deep") from error
    except ValueError as error:
        raise InputError(f"{path}:1: not a pattern: a number in it cannot be read: {_plain(error)}") from error
    try:
        return Pattern.model_validate(data)
    except PatternError as error:
        line, column = _place(text, error.key, _at(data, error.key), error.column)
        raise InputError(f"{path}:{line}:{f'{column}:' * bool(column)} {error}") from error
    except ValidationError as error:
        key, message = _first_error(error)
        line, _ = _place(text, key)
        raise InputError(f"{path}:{line}: {message}") from error


def load_patterns(paths: Iterable[Path]) -> tuple[Pattern, ...]:
    """Read pattern files; a folder stands for its `*.toml` files in alphabetical order.

    Raises InputError where two patterns have one name.
    """
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.toml")) if path.is_dir() else [path]
    patterns: dict[str, Pattern] = {}
    origins: dict[str, Path] = {}
    for file in files:
        pattern = load_pattern(file)
        if pattern.name in patterns:
            first = origins[pattern.name]
            raise InputError(f"{file}: {first} has a pattern named `{pattern.name}` too; give this one another name")
        patterns[pattern.name], origins[pattern.name] = pattern, file
    return tuple(patterns.values())


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not an ordinary file; name a .toml file")
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > LARGEST_FILE:
        raise InputError(f"{path}: larger than {LARGEST_FILE:,} bytes; a pattern file is a few lines")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not a TOML file: it is not written in UTF-8") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MOST_DOTS:
            raise InputError(f"{path}:{number}: more than {MOST_DOTS} dots in one line; no key has so many parts")
    return text


def _toml_place(error: tomllib.TOMLDecodeError, text: str) -> str:
    """`:line:column: not a TOML file: what was wrong`."""
    said = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
    if said is None:
        return f":1: not a TOML file: {_plain(error)}"
    line = int(said[2]) if said[2] else max(len(text.splitlines()), 1)
    column = f":{said[3]}" if said[3] else ""
    what = _SAID.get(said[1]) or shown(said[1][:1].lower() + said[1][1:])
    return f":{line}{column}: not a TOML file: {what}{'' if said[2] else ' at the end of the file'}"


def _plain(error: Exception) -> str:
    return shown(str(error).splitlines()[0]) if str(error) else type(error).__name__


def _first_error(error: ValidationError) -> tuple[tuple[str, ...], str]:
    """(path of the key, message) of the first thing that is wrong; a key that is misspelt is missing too."""
    errors: list[Any] = list(error.errors(include_url=False))
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    key = tuple(str(part) for part in first["loc"])
    name = shown(".".join(key))
    if first["type"] == "extra_forbidden":
        fields = Decomposition.model_fields if key[0] == "decomposition" else Pattern.model_fields
        return key, f"unknown key `{shown(key[-1])}`{suggestion(key[-1], fields) or f'; known: {_list(fields)}'}"
    if first["type"] == "missing":
        return key, f"the key `{name}` is missing"
    if first["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        found = first["input"] if isinstance(first["input"], str) else type(first["input"]).__name__
        return key, f"`{name}` is `{shown(found)}`; known: {_list(known)}{suggestion(found, known)}"
    if first["type"] == "string_pattern_mismatch":
        return (
            key,
            f"`{name}` is `{shown(first['input'])}`; use at most 64 small letters, digits and hyphens",
        )
    if first["type"] in ("too_long", "too_short"):
        count, most = first["ctx"]["actual_length"], first["ctx"].get("max_length")
        bound = f"{first['ctx']['min_length']} is the least" if most is None else f"{most} is the most"
        return key, f"`{name}` has {'too many' if count is None else count} entries; {bound}"
    if first["type"] in _WRITTEN:
        return key, f"`{name}` is not {_WRITTEN[first['type']]}"
    message = first["msg"]
    return key, f"`{name}`: {message[:1].lower()}{message[1:]}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _at(data: Mapping[str, Any], key: tuple[str, ...]) -> object:
    value: Any = data
    for part in key:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _place(text: str, key: tuple[str, ...], value: object = None, column: int = 0) -> tuple[int, int]:
    """(line, column) of a key, or of a place in the string that is its value; column 0 where only the line is known."""
    start = _offset(text, key)
    if column and isinstance(value, str):
        quoted = text.find(value, text.find("=", start))
        if quoted >= 0:
            start = min(quoted + column - 1, len(text))
            before = text[:start]
            return before.count("\n") + 1, start - (before.rfind("\n") + 1) + 1
    return text[:start].count("\n") + 1, 0


def _offset(text: str, key: tuple[str, ...]) -> int:
    """Where a key stands: in its own table, in an inline table, or in the nearest one above that is written."""
    section: tuple[str, ...] = ()
    best, depth, position = 0, 0, 0
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if bare.startswith("["):
            section = tuple(part.strip(" \"'") for part in bare.strip("[]").split("."))
            found = len(section) if section == key[: len(section)] else 0
        elif not bare.startswith("#"):
            found = 0
            inside = len(section) if section == key[: len(section)] else -1
            for part in key[inside:] if inside >= 0 else ():
                if not re.search(rf"(?:^|[\s{{,.\"']){re.escape(part)}[\"']?\s*[=.]", line):
                    break
                found = found + 1 if found else inside + 1
        else:
            found = 0
        if found > depth:
            word = re.search(rf"{re.escape(key[found - 1])}", line)
            best, depth = position + (word.start() if word else 0), found
        position += len(line)
    return best
