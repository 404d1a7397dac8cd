"""`plan.json`: what was done to a model, so that its shape can be built again; and the features that stayed."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modegpt_graph.errors import InputError
from modegpt_graph.match.formula import FormulaError
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.rewrite.apply import RewrittenModule
from modegpt_graph.rewrite.solution import Solution

SCHEMA_VERSION = 1
PLAN_FILE = "plan.json"
SELECTIONS_FILE = "selections.safetensors"
FACTORY = "factory"
PACKAGES = ("modegpt-graph", "torch", "transformers")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BufferPlan(_Strict):
    """A buffer that a generated forward method reads: positions, or a constant of the trace."""

    shape: tuple[int, ...]
    dtype: str


class LinearPlan(_Strict):
    """The size of an `nn.Linear`."""

    out_features: int
    in_features: int
    bias: bool


class ModulePlan(_Strict):
    """One rewritten module.

    class_name: of its generated class, None where it kept its own.   attributes, buffers: what that class reads.
    linears: path within the module → the `nn.Linear` that stands there now.
    parameters: path within the module → shape, for resized matrices that are no `nn.Linear`.
    """

    path: str
    class_name: str | None
    attributes: Mapping[str, int] = Field(default_factory=dict)
    buffers: Mapping[str, BufferPlan] = Field(default_factory=dict)
    linears: Mapping[str, LinearPlan] = Field(default_factory=dict)
    parameters: Mapping[str, tuple[int, ...]] = Field(default_factory=dict)


class Plan(_Strict):
    """What a compressed model's folder says about itself.

    versions: package → version that wrote the folder.   source: what the user called the original.
    architecture: class name, or `factory` for a plain module.
    auto_map: of an original whose own classes are code in its folder: what leads the library to them.
    patterns: whole, so that a pattern of the user's own is known again.
    approximate_norm: whether norms on queries and keys were approximated.
    sites: id → (groups, blocks kept) of each kind of block; which blocks is in `selections.safetensors`.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    versions: Mapping[str, str]
    source: str
    architecture: str
    auto_map: Mapping[str, str] = Field(default_factory=dict)
    patterns: tuple[Pattern, ...]
    approximate_norm: bool = False
    sites: Mapping[str, tuple[tuple[int, int], ...]]
    modules: tuple[ModulePlan, ...]


def make_plan(
    model: nn.Module,
    rewritten: Sequence[RewrittenModule],
    solutions: Mapping[str, Solution],
    patterns: Sequence[Pattern],
    source: str,
    architecture: str,
    approximate_norm: bool = False,
) -> Plan:
    """The plan of a model that was rewritten."""
    sites = {site: tuple((len(kept), kept.shape[1]) for kept in one.kept) for site, one in solutions.items()}
    return Plan(
        versions=installed_versions(),
        source=source,
        architecture=architecture,
        auto_map=_own_auto_map(model),
        patterns=tuple(patterns),
        approximate_norm=approximate_norm,
        sites=sites,
        modules=describe(model, rewritten),
    )


def _own_auto_map(model: nn.Module) -> dict[str, str]:
    """The configuration's entries that lead to code, without the repository that the code came from."""
    entries = getattr(getattr(model, "config", None), "auto_map", None) or {}
    return {name: entry.rpartition("--")[2] for name, entry in entries.items() if isinstance(entry, str)}


def describe(model: nn.Module, rewritten: Sequence[RewrittenModule]) -> tuple[ModulePlan, ...]:
    """What changed in each rewritten module of `model`."""
    return tuple(_describe_module(model.get_submodule(one.path), one) for one in rewritten)


def _describe_module(module: nn.Module, one: RewrittenModule) -> ModulePlan:
    linears, parameters = {}, {}
    for path, shape in one.resized.items():
        if shape.is_linear:
            linears[path] = LinearPlan(out_features=shape.out_features, in_features=shape.in_features, bias=shape.bias)
        else:
            prefix = f"{path}." if path else ""
            own = module.get_submodule(path).named_parameters(recurse=False)
            parameters |= {f"{prefix}{name}": tuple(parameter.shape) for name, parameter in own}
    buffers = one.forward.buffers if one.forward else {}
    return ModulePlan(
        path=one.path,
        class_name=one.class_name,
        attributes=dict(one.forward.attributes) if one.forward else {},
        buffers={
            name: BufferPlan(shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
            for name, value in buffers.items()
        },
        linears=linears,
        parameters=parameters,
    )


def installed_versions() -> dict[str, str]:
    """Package → its version here, for the packages that a folder depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def write_plan(directory: Path, plan: Plan, solutions: Mapping[str, Solution]) -> None:
    """Write `plan.json` and `selections.safetensors` into `directory`."""
    text = json.dumps(plan.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (directory / PLAN_FILE).write_text(text + "\n", encoding="utf-8")
    tensors = {
        f"{site}/{kind}": kept.to(device="cpu", dtype=torch.int64).clone(memory_format=torch.contiguous_format)
        for site, solution in solutions.items()
        for kind, kept in enumerate(solution.kept)
    }
    save_file(tensors, directory / SELECTIONS_FILE)


def read_plan(directory: Path) -> Plan:
    """Read `plan.json`. Raises InputError where there is none, or it is not of a version that is known here."""
    file = directory / PLAN_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        found = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(found, int) and found > SCHEMA_VERSION:
            raise InputError(
                f"{directory} was written by a newer modegpt-graph (plan version {found}, known here: "
                f"{SCHEMA_VERSION}); upgrade modegpt-graph"
            )
        return Plan.model_validate(data)
    except FileNotFoundError:
        raise InputError(f"{directory} is no compressed model: it has no {PLAN_FILE}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{file} is damaged: {where}: {first['msg']}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, FormulaError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def read_selections(directory: Path, plan: Plan) -> dict[str, Solution]:
    """Site id → which blocks stay, as the folder says. Raises InputError where file and plan do not agree."""
    file = directory / SELECTIONS_FILE
    try:
        tensors = load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    solutions = {}
    for site, shapes in plan.sites.items():
        kept = [tensors.get(f"{site}/{kind}") for kind in range(len(shapes))]
        if not all(_is_selection(chosen, shape) for chosen, shape in zip(kept, shapes, strict=True)):
            raise InputError(f"{file} is damaged: it does not hold the selection that {PLAN_FILE} says of {site}")
        solutions[site] = Solution(tuple(chosen for chosen in kept if chosen is not None))
    return solutions


def _is_selection(chosen: Tensor | None, shape: tuple[int, int]) -> bool:
    """Whether `chosen` is (G, n) of whole numbers from 0, none of them twice in a row."""
    if chosen is None or tuple(chosen.shape) != shape or chosen.dtype != torch.int64 or (chosen < 0).any():
        return False
    ordered = chosen.sort(dim=1).values
    return bool((ordered[:, 1:] != ordered[:, :-1]).all())
