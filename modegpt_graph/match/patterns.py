"""Pattern files: one TOML file, one kind of pair. Data, checked before anything is matched."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modegpt_graph.errors import InputError
from modegpt_graph.match.formula import Apply, Expression, FormulaError, applications, parse

RoleKind = Literal["linear", "elementwise", "chain"]
OPERATIONS = {"scores": 2, "weights": 1, "mix": 2}
LARGEST_FILE = 64 * 1024


class Decomposition(BaseModel):
    """What is done with a pair: the roles whose rows are selected, the roles fitted again, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    select: tuple[str, ...] = Field(min_length=1)
    refit: tuple[str, ...] = ()
    method: Literal["nystrom", "cr", "svd"]


class Pattern(BaseModel):
    """One pattern.

    formula: the form that is looked for; or `variants`, named alternative forms tried in order.
    roles: name → `linear` (a weight matrix), `elementwise` (any function of single elements), `chain` (anything between
    one weight matrix and here; its commutant is computed).
    paper_type: the type that the MoDeGPT paper gives the pair.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")]
    formula: str | None = None
    variants: Mapping[str, str] = Field(default_factory=dict)
    paper_type: Literal["I", "II", "III"] | None = None
    roles: Mapping[str, RoleKind]
    decomposition: Decomposition

    def forms(self) -> dict[str, Expression]:
        """Variant name → parsed formula."""
        texts = dict(self.variants) if self.formula is None else {"plain": self.formula, **self.variants}
        return {name: parse(text) for name, text in texts.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "Pattern":
        if self.formula is None and not self.variants:
            raise ValueError("a pattern needs a `formula` or `variants`")
        used: set[str] = set()
        for form in self.forms().values():
            for application in applications(form):
                used.add(application.name)
                _check_application(application, self.roles)
        for role in self.roles:
            if role not in used:
                raise ValueError(f"role `{role}` is never used in the formula")
        for role in (*self.decomposition.select, *self.decomposition.refit):
            if self.roles.get(role) != "linear":
                raise ValueError(f"decomposition names `{role}`, which is no `linear` role{_suggest(role, self.roles)}")
        return self


def _check_application(application: Apply, roles: Mapping[str, RoleKind]) -> None:
    name, count = application.name, len(application.arguments)
    if name not in roles and name not in OPERATIONS:
        raise ValueError(f"`{name}` is neither a role nor an operation{_suggest(name, [*roles, *OPERATIONS])}")
    expected = 1 if name in roles else OPERATIONS[name]
    if count != expected:
        raise ValueError(f"`{name}` takes {expected} argument{'s' * (expected > 1)}, not {count}")


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _line(text: str, key: str) -> int:
    """Line of the first mention of a key."""
    return next((n for n, line in enumerate(text.splitlines(), 1) if line.strip().strip("[]").startswith(key)), 1)


def _unreadable(data: Mapping[str, object]) -> str:
    """Key of the first formula that cannot be read."""
    variants = data.get("variants")
    texts = {"formula": data.get("formula"), **(variants if isinstance(variants, dict) else {})}
    for key, text in texts.items():
        try:
            parse(str(text or "_"))
        except FormulaError:
            return key
    return "formula"


def _blamed(text: str, message: str) -> int:
    """Line of the word that a message is about: where it is a key, else where it is first mentioned."""
    word = re.search(r"`(\w[\w-]*)`", message)
    if word is None:
        return 1
    lines = list(enumerate(text.splitlines(), 1))
    key, mention = re.compile(rf"\s*{word[1]}\s*="), re.compile(rf"\b{word[1]}\b")
    keys = [number for number, line in lines if key.match(line)]
    mentions = [number for number, line in lines if mention.search(line) and not line.lstrip().startswith("#")]
    calls = [number for number, line in lines if re.search(rf"\b{word[1]}\s*\(", line)] if "takes" in message else []
    return (calls or keys or mentions or [1])[0]


def load_pattern(path: Path) -> Pattern:
    """Read one pattern file. Raises InputError that names file, line and what is wrong."""
    try:
        raw = path.read_bytes()
        if len(raw) > LARGEST_FILE:
            raise InputError(f"{path}: larger than {LARGEST_FILE} bytes; a pattern file is a few lines")
        text = raw.decode()
        data = tomllib.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error
    try:
        return Pattern.model_validate(data)
    except FormulaError as error:
        raise InputError(f"{path}:{_line(text, _unreadable(data))}:{error.column}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "formula"]
        known = [*Pattern.model_fields, *Decomposition.model_fields]
        if first["type"] == "extra_forbidden":
            message = f"unknown key `{where[-1]}`{_suggest(where[-1], known)}"
        else:
            message = first["msg"].removeprefix("Value error, ")
            message = f"`{'.'.join(where)}`: {message}" if where else message
        raise InputError(f"{path}:{_line(text, where[-1]) if where else _blamed(text, message)}: {message}") from error


def load_patterns(paths: Iterable[Path]) -> tuple[Pattern, ...]:
    """Read pattern files; a folder stands for its `*.toml` files in alphabetical order.

    Raises InputError where two patterns have one name.
    """
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.toml")) if path.is_dir() else [path]
    patterns: dict[str, Pattern] = {}
    for file in files:
        pattern = load_pattern(file)
        if pattern.name in patterns:
            raise InputError(f"{file}: a pattern named `{pattern.name}` was read already; give this one another name")
        patterns[pattern.name] = pattern
    return tuple(patterns.values())
