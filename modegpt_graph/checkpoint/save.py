"""A compressed model to a folder: weights, configuration, tokenizer, modelling file, plan and report."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_model

from modegpt_graph.checkpoint.folder import written_whole
from modegpt_graph.checkpoint.modeling import (
    CONFIG_KEY,
    MODELING_FILE,
    auto_map,
    config_entry,
    modeling_source,
    remote_files,
)
from modegpt_graph.checkpoint.plan import FACTORY, PLAN_FILE, Plan, make_plan, write_plan
from modegpt_graph.errors import ModegptError
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.models import ModelSource, can_generate
from modegpt_graph.models.build import quiet
from modegpt_graph.rewrite.apply import RewrittenModule
from modegpt_graph.rewrite.solution import Solution

REPORT_FILE = "report.json"
WEIGHTS_FILE = "model.safetensors"


def save(
    directory: str | Path,
    model: Any,
    rewritten: Sequence[RewrittenModule],
    solutions: Mapping[str, Solution],
    patterns: Sequence[Pattern],
    source: ModelSource,
    tokenizer: Any = None,
    report: Mapping[str, Any] | None = None,
    *,
    approximate_norm: bool = False,
) -> None:
    """Write a rewritten model to `directory`, which is there whole afterwards or not at all; `model` stays as it is.

    source: of the original.   tokenizer: None where the model has none.
    approximate_norm: whether norms on queries and keys were approximated.
    A model of the transformers library also gets its configuration and a modelling file; any other module is written
    as weights and plan, to be loaded into what its factory makes.
    Raises InputError where `directory` is taken, ModegptError where the model cannot be written.
    """
    architecture = type(model).__name__ if can_generate(model) else FACTORY
    plan = make_plan(model, rewritten, solutions, patterns, source.name, architecture, approximate_norm)
    with written_whole(Path(directory)) as working:
        try:
            if can_generate(model):
                write_pretrained(working, model, rewritten, plan, model.save_pretrained)
            else:
                save_model(model, str(working / WEIGHTS_FILE), metadata={"format": "pt"})
            if tokenizer is not None:
                tokenizer.save_pretrained(working)
            write_plan(working, plan, solutions)
            if report is not None:
                text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
                (working / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
            for file in working.glob("*.safetensors"):
                file.chmod((working / PLAN_FILE).stat().st_mode)  # the library keeps them from everybody else
        except (OSError, safetensors.SafetensorError) as error:
            raise ModegptError(f"{directory} could not be written: {error}") from error


def write_pretrained(
    directory: Path,
    model: Any,
    rewritten: Sequence[RewrittenModule],
    plan: Plan,
    write: Callable[..., Any],
    **keywords: Any,
) -> None:
    """Configuration, weights and modelling file of a transformers model, the first two by the library's own `write`."""
    written_by = " ".join(("modegpt-graph", *plan.versions.get("modegpt-graph", "").split()))
    text = modeling_source(model, rewritten, source=plan.source, written_by=written_by)
    with quiet(), _own_config(model) as config:
        setattr(config, CONFIG_KEY, config_entry(plan.modules))
        # Under the names that the modules have here: older names of a class are known to the library by the class's
        # name, and the generated class has another.
        write(directory, **{"save_original_format": False, **keywords})
        # Afterwards, because for an original that is code of its own the library leads to that code again.
        config.auto_map = {**plan.auto_map, **auto_map(plan.architecture)}
        config.save_pretrained(directory)
    for file in remote_files(model):
        shutil.copyfile(file, directory / file.name)
    (directory / MODELING_FILE).write_text(text, encoding="utf-8")


@contextmanager
def _own_config(model: Any) -> Iterator[Any]:
    """A copy of the model's configuration in its place: the library writes into what it saves."""
    original = model.config
    model.config = copy.deepcopy(original)
    try:
        yield model.config
    finally:
        model.config = original
