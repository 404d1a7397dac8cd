"""Questions with several answers, read from .jsonl files of two shapes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modegpt_graph.errors import InputError

SPACE = " "
SHAPES = "`query`, `choices` and `gold`, or `context_options`, `continuation` and `gold`"


@dataclass(frozen=True)
class Question:
    """Pairs of context and continuation, of which the model should find the one at `gold` the likeliest.

    Joined without anything in between, a pair is the text that the model reads.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """name: of the file, without its suffix."""

    name: str
    questions: tuple[Question, ...]


def read_task(file: str | Path, records: int | None = None) -> Task:
    """The first `records` questions of a file, all where None; one JSON object a line.

    `query`, `choices`: one context, several continuations.   `context_options`, `continuation`: the other way round.
    Both are joined by a space, unless the context ends or the continuation begins with white space.
    Raises InputError, with the line, for anything else.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"there is no task file {path}")
    questions: list[Question] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if records is not None and len(questions) == records:
                    break
                if line.strip():
                    questions.append(_question(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the task file {path} cannot be read: {error}") from None
    if not questions:
        raise InputError(f"the task file {path} holds no questions; a line is a JSON object with {SHAPES}")
    return Task(path.stem, tuple(questions))


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: this is no JSON ({error})") from None
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: a line must be a JSON object with {SHAPES}")
    contexts, continuations = _sides(record, where)
    pairs = tuple(_joined(context, continuation) for context in contexts for continuation in continuations)
    gold = record.get("gold")
    if type(gold) is not int or not 0 <= gold < len(pairs):
        raise InputError(f"{where}: gold must be a number from 0 to {len(pairs) - 1}, not {gold!r}")
    return Question(pairs, gold)


def _sides(record: Mapping[str, Any], where: str) -> tuple[list[str], list[str]]:
    """Contexts and continuations, one of either and at least two of the other."""
    if {"query", "choices"} <= record.keys():
        one, several = "query", "choices"
    elif {"context_options", "continuation"} <= record.keys():
        one, several = "continuation", "context_options"
    else:
        raise InputError(f"{where}: a line must have {SHAPES}")
    if not isinstance(record[one], str):
        raise InputError(f"{where}: {one} must be a text")
    options = record[several]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) for option in options):
        raise InputError(f"{where}: {several} must be a list of two texts or more")
    return (options, [record[one]]) if one == "continuation" else ([record[one]], options)


def _joined(context: str, continuation: str) -> tuple[str, str]:
    """White space between the two belongs to the continuation, where tokenizers put it."""
    bare = context.rstrip()
    between = context[len(bare) :]
    if not between and continuation[:1].strip() == continuation[:1]:
        between = SPACE
    return bare, between + continuation
