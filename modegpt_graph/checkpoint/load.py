"""A folder back to a model: the shape from its plan, on the original class; the values from its weights file.

No code of the folder is run: its modelling file is for those who do not have this package.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_model
from torch import nn

from modegpt_graph.checkpoint.modeling import AUTO_CLASS, CONFIG_KEY
from modegpt_graph.checkpoint.plan import (
    FACTORY,
    PLAN_FILE,
    Plan,
    describe,
    installed_versions,
    read_plan,
    read_selections,
    write_plan,
)
from modegpt_graph.checkpoint.save import WEIGHTS_FILE, write_pretrained
from modegpt_graph.errors import InputError, ModegptError
from modegpt_graph.match.prepare import survey_model
from modegpt_graph.match.site_module import SiteModule
from modegpt_graph.models import ModelSource, resolve
from modegpt_graph.models.build import quiet
from modegpt_graph.models.source import one_line
from modegpt_graph.rewrite.apply import RewrittenModule, rewrite
from modegpt_graph.rewrite.solution import Solution

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Factory = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


def is_compressed(directory: str | Path) -> bool:
    """Whether `directory` is a folder that `save` wrote."""
    return (Path(directory) / PLAN_FILE).is_file()


def load(
    directory: str | Path,
    factory: str | Factory | None = None,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model that `save` wrote to `directory`, in evaluation mode.

    A model of the transformers library comes from its own class's `from_pretrained`, and is one to that library.
    factory: for any other module, what makes the original one: `FILE.py:NAME`, or a function that returns (module,
    example_inputs).   dtype: None for that of the file.   trust_remote_code: only for originals that needed it.
    Raises InputError where the folder is none of `save`'s, is damaged, or does not fit what is installed here.
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    plan = read_plan(folder)
    solutions = read_selections(folder, plan)
    if plan.architecture == FACTORY:
        if factory is None:
            raise InputError(f"{folder} holds a module of its own; give the factory that made it, as FILE.py:NAME")
        return _load_into(folder, _from_factory(factory), plan, solutions, dtype)
    if factory is not None:
        raise InputError(f"{folder} holds a {plan.architecture} of the transformers library; it needs no factory")
    return _load_pretrained(folder, plan, solutions, dtype, trust_remote_code)


def _from_factory(factory: str | Factory) -> ModelSource:
    if isinstance(factory, str):
        source = resolve(factory)
        if source.kind != "factory":
            raise InputError(f"{factory} is no factory; write it as FILE.py:NAME")
        return source
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InputError(f"the factory must return (module, example_inputs), not {type(made).__name__}")
    return resolve(made[0], example_inputs=made[1])


def _load_into(
    folder: Path, source: ModelSource, plan: Plan, solutions: Mapping[str, Solution], dtype: torch.dtype | None
) -> nn.Module:
    modules = _found_again(folder, source, plan, solutions)
    model = source.load()
    file = folder / WEIGHTS_FILE
    try:
        _rewrite_as_planned(folder, model, modules, plan, solutions)
        _cast(model, file, dtype)
        load_model(model, file)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{file} does not fit the factory's module: {one_line(error)}") from error
    return model.eval()


def _cast(model: nn.Module, file: Path, dtype: torch.dtype | None) -> None:
    """Give every floating-point parameter `dtype`, or that which it has in the file."""
    with safetensors.safe_open(file, framework="pt") as stored:
        names = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118 (no mapping)
    for name, parameter in model.named_parameters():
        wanted = dtype or DTYPES.get(names.get(name, ""))
        if wanted is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted)


def _load_pretrained(
    folder: Path,
    plan: Plan,
    solutions: Mapping[str, Solution],
    dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> nn.Module:
    source = _original(folder, plan, trust_remote_code)
    skeleton = source.skeleton()
    modules = _found_again(folder, source, plan, solutions)

    def build(model: nn.Module) -> tuple[RewrittenModule, ...]:
        return _rewrite_as_planned(folder, model, modules, plan, solutions)

    compressed: Any = _compressed_class(type(skeleton), build, plan, solutions)
    try:
        with quiet():
            model, found = compressed.from_pretrained(
                str(folder),
                config=source.config,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder}: the weights cannot be loaded: {one_line(error)}") from error
    _check_complete(folder, found)
    return model


def _original(folder: Path, plan: Plan, trust_remote_code: bool) -> ModelSource:
    """The original's source, as the folder's configuration has it; what leads to code in the folder is taken out."""
    source = resolve(folder, trust_remote_code=trust_remote_code)
    for entry in ("auto_map", CONFIG_KEY, "transformers_weights"):
        if hasattr(source.config, entry):
            delattr(source.config, entry)
    if trust_remote_code and plan.auto_map:
        source.config.auto_map = dict(plan.auto_map)
        made = plan.auto_map.get(AUTO_CLASS, "").rpartition(".")[2]
        source = dataclasses.replace(source, architecture=made or source.architecture)
    source.config._attn_implementation = None
    if source.architecture != plan.architecture:
        raise InputError(
            f"{folder}: its configuration makes a {source.architecture}, its plan is for a {plan.architecture}"
        )
    return source


def _compressed_class(
    original: Any,
    build: Callable[[nn.Module], tuple[RewrittenModule, ...]],
    plan: Plan,
    solutions: Mapping[str, Solution],
) -> type:
    """A subclass whose instances have the planned sizes before any weights are loaded into them."""

    def __init__(self: Any, config: Any, *inputs: Any, **keywords: Any) -> None:
        original.__init__(self, config, *inputs, **keywords)
        # The library builds under the meta device; the labels that a rewrite follows need values.
        with torch.device("cpu"):
            self._modegpt_graph = build(self)

    def save_pretrained(self: Any, save_directory: str | Path, **keywords: Any) -> None:
        """The library's method, and beside its files the plan: what is saved is a compressed model again."""
        folder = Path(save_directory)
        write = functools.partial(original.save_pretrained, self)
        write_pretrained(folder, self, self._modegpt_graph, plan, write, **keywords)
        write_plan(folder, plan, solutions)

    # With the original's name: what the library derives from it (loss, architecture in a configuration) stays.
    members = {"__init__": __init__, "save_pretrained": save_pretrained, "__module__": original.__module__}
    return type(original.__name__, (original,), members)


def _found_again(
    folder: Path, source: ModelSource, plan: Plan, solutions: Mapping[str, Solution]
) -> tuple[SiteModule, ...]:
    """The modules of the planned sites. Raises InputError where one is not there, or has not the planned shape."""
    try:
        modules = survey_model(source, plan.patterns, approximate_norm=plan.approximate_norm).modules()
    except InputError:
        raise
    except ModegptError as error:
        raise InputError(f"{folder}: the original cannot be traced again: {error}{_versions(plan)}") from error
    layouts = {placed.site.id: placed.footprint.layout for one in modules for placed in one.placed}
    for site, solution in solutions.items():
        layout = layouts.get(site)
        if layout is None:
            raise InputError(f"{folder}: the site {site} is not found again in {plan.architecture}{_versions(plan)}")
        counts = [(layout.groups, kind.count) for kind in layout.kinds]
        fits = len(counts) == len(solution.kept) and all(
            len(kept) == groups and kept.shape[1] <= count and (kept < count).all()
            for kept, (groups, count) in zip(solution.kept, counts, strict=True)
        )
        if not fits:
            raise InputError(f"{folder}: the selection of {site} does not fit its (groups, blocks) {counts}")
    return modules


def _rewrite_as_planned(
    folder: Path, model: nn.Module, modules: Sequence[SiteModule], plan: Plan, solutions: Mapping[str, Solution]
) -> tuple[RewrittenModule, ...]:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rewritten = rewrite(model, tuple(modules), solutions)
    if describe(model, rewritten) != plan.modules:
        raise InputError(f"{folder}: rewriting {plan.architecture} gives other modules than planned{_versions(plan)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or (bool(trained) and parameter.is_floating_point()))
    return rewritten


def _check_complete(folder: Path, found: Mapping[str, Any]) -> None:
    for what in ("mismatched_keys", "missing_keys", "unexpected_keys", "error_msgs"):
        if entries := sorted(map(str, found.get(what) or ())):
            more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
            said = what.replace("_keys", "").replace("error_msgs", "unreadable")
            raise InputError(f"{folder}: the weights do not fit: {said}: {entries[0]}{more}")


def _versions(plan: Plan) -> str:
    """What it was written with and what is here, where that differs."""
    here = installed_versions()
    other = [
        f"{name} {then} (here {here.get(name) or 'not installed'})"
        for name, then in plan.versions.items()
        if then and here.get(name) != then
    ]
    return f"; it was written with {', '.join(other)}" if other else ""
