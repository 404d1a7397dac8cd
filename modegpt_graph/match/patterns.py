"""Patterns: what kind of pair is looked for, and what is done with it. Data, checked before anything is matched."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modegpt_graph.match.formula import NAME, Apply, Expression, FormulaError, Name, parse, parts_of

RoleKind = Literal["linear", "elementwise", "chain"]
MethodName = Literal["nystrom", "cr", "svd"]
OPERATIONS = {"scores": 2, "weights": 1, "mix": 2, "join": 2}
MOST_FORMS = 16
TAKEN_WHOLE = {
    ("elementwise", "elementwise"): "all functions in a row",
    ("chain", "elementwise"): "everything up to a matrix",
    ("chain", "chain"): "everything up to a matrix",
}  # (kind of a role, kind of the role right within it) → what the outer one stands for already


class PatternError(FormulaError):
    """A pattern that contradicts itself.

    key: path of the key that is wrong.   column: place in its formula (from 1), 0 where it is none.
    """

    def __init__(self, message: str, key: tuple[str, ...], column: int = 0) -> None:
        super().__init__(message, column)
        self.key = key


class Decomposition(BaseModel):
    """What is done with a pair: the roles whose rows are selected, the role fitted again, and how.

    The method is a claim about what stands in between: `svd` that any mixing of features passes through, `nystrom` that
    each feature can be dropped alone, `cr` that blocks of them can. `otherwise` is used where the first claim is
    refuted. The claims are checked at every site.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    select: tuple[str, ...] = Field(min_length=1)
    refit: tuple[str, ...] = Field(default=(), max_length=1)
    method: MethodName
    otherwise: MethodName | None = None


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
    variants: Mapping[str, str] = Field(default_factory=dict, max_length=MOST_FORMS)
    paper_type: Literal["I", "II", "III"] | None = None
    roles: Mapping[str, RoleKind]
    decomposition: Decomposition

    def texts(self) -> dict[str, str]:
        """Variant name → formula as written."""
        return dict(self.variants) if self.formula is None else {"plain": self.formula, **self.variants}

    def forms(self) -> dict[str, Expression]:
        """Variant name → parsed formula."""
        return {name: parse(text) for name, text in self.texts().items()}

    @model_validator(mode="after")
    def _consistent(self) -> "Pattern":
        if self.formula is None and not self.variants:
            raise PatternError("a pattern needs a `formula` or `variants`", ("name",))
        if self.formula is not None and "plain" in self.variants:
            raise PatternError(
                "`plain` is the name of `formula` itself; give this variant another", ("variants", "plain")
            )
        for role in self.roles:
            if role in OPERATIONS or role == "_":
                kind = "anything" if role == "_" else "an operation"
                raise PatternError(f"`{role}` is {kind}; give this role another name", ("roles", role))
            if not NAME.fullmatch(role):
                what = f"role `{shown(role)}` cannot be written in a formula"
                raise PatternError(f"{what}; use letters, digits and `_`, a letter first", ("roles", role))
        used: set[str] = set()
        for name, text in self.texts().items():
            key = ("formula",) if name == "plain" else ("variants", name)
            try:
                used |= self._check_form(parse(text), key)
            except PatternError:
                raise
            except FormulaError as error:
                raise PatternError(str(error), key, error.column) from error
        for role in self.roles:
            if role not in used:
                raise PatternError(f"role `{shown(role)}` is never used in the formula", ("roles", role))
        self._check_decomposition()
        return self

    def _check_form(self, form: Expression, key: tuple[str, ...]) -> set[str]:
        """Names that a form applies. Raises PatternError where it cannot be matched."""
        names: set[str] = set()
        for part in parts_of(form):
            if isinstance(part, Apply):
                names.add(part.name)
                self._check_application(part, key)
                self._check_reach(part, key)
            elif isinstance(part, Name) and (part.name in self.roles or part.name in OPERATIONS):
                kind = "a role" if part.name in self.roles else "an operation"
                raise PatternError(f"`{part.name}` is {kind}: say what of, as in `{part.name}(x)`", key, part.column)
        outermost = form.name if isinstance(form, Apply) else None
        if outermost is None or self.roles.get(outermost, "linear") != "linear":
            raise PatternError("a formula starts with a `linear` role or an operation, as in `down(…)`", key, 1)
        missing = [role for role in self._touched() if self.roles.get(role) == "linear" and role not in names]
        if missing:
            raise PatternError(f"decomposition names `{missing[0]}`, which is not in this formula", key, 1)
        if not self.decomposition.refit and "scores" not in names:
            raise PatternError(
                "nothing is fitted again: name the matrix that reads the features in `refit`",
                ("decomposition", "refit"),
            )
        return names

    def _touched(self) -> tuple[str, ...]:
        return self.decomposition.select + self.decomposition.refit

    def _check_application(self, part: Apply, key: tuple[str, ...]) -> None:
        name, count = part.name, len(part.arguments)
        if name == "_":
            raise PatternError("`_` is anything, and takes nothing in brackets", key, part.column)
        if name not in self.roles and name not in OPERATIONS:
            operations = ", ".join(f"`{one}`" for one in OPERATIONS)
            known = suggestion(name, [*self.roles, *OPERATIONS])
            known = known or f"; give it a line in `roles`, or use an operation: {operations}"
            raise PatternError(f"`{shown(name)}` is neither a role nor an operation{known}", key, part.column)
        expected = 1 if name in self.roles else OPERATIONS[name]
        if count != expected:
            raise PatternError(
                f"`{shown(name)}` takes {expected} argument{'s' * (expected > 1)}, not {count}", key, part.column
            )

    def _check_reach(self, part: Apply, key: tuple[str, ...]) -> None:
        """Raises PatternError where what a role stands for takes what the role within it is to stand for."""
        inner = part.arguments[0]
        if not isinstance(inner, Apply):
            return
        outside, inside = (self.roles.get(name, "operation") for name in (part.name, inner.name))
        if (outside, inside) in TAKEN_WHOLE:
            taken = f"`{part.name}`, whose kind `{outside}` takes {TAKEN_WHOLE[outside, inside]} already"
            raise PatternError(f"`{inner.name}` is right within {taken}: leave one out", key, inner.column)

    def _check_decomposition(self) -> None:
        decomposition = self.decomposition
        for field in ("select", "refit"):
            names = getattr(decomposition, field)
            for role in names:
                if self.roles.get(role) != "linear":
                    linear = [name for name, kind in self.roles.items() if kind == "linear"]
                    what = f"`{shown(role)}`, which is no `linear` role{suggestion(role, linear)}"
                    raise PatternError(f"`{field}` names {what}", ("decomposition", field))
            if len(set(names)) != len(names):
                raise PatternError(f"`{field}` names a role twice", ("decomposition", field))
        both = [role for role in decomposition.select if role in decomposition.refit]
        if both:
            raise PatternError(f"`{both[0]}` is both selected and fitted again", ("decomposition", "refit"))
        if decomposition.method == "cr" and decomposition.refit:
            raise PatternError(
                "`cr` fits nothing again: leave out `refit`, or use `nystrom`", ("decomposition", "method")
            )
        if decomposition.method == "nystrom" and not decomposition.refit:
            raise PatternError("`nystrom` fits a matrix again: name it in `refit`", ("decomposition", "method"))
        if not decomposition.refit and len(decomposition.select) != 2:
            raise PatternError("`select` names the two sides of `scores`", ("decomposition", "select"))


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing where no known word is near, however it is written."""
    spelt = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word[:64].lower(), list(spelt), n=1)
    return f"; did you mean `{shown(spelt[close[0]])}`?" if close else ""


def shown(word: str) -> str:
    """A word of a stranger's file as it may stand in a message: short, printable, in one line."""
    printable = word if word.isprintable() else ascii(word)[1:-1]
    return printable if len(printable) <= 64 else f"{printable[:60]}…"
