"""From a model's source to its sites, in the whole model and in their modules: what every command starts with."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modegpt_graph.data import patterns_directory
from modegpt_graph.match.analyse import Survey, survey
from modegpt_graph.match.modules import Found, site_modules
from modegpt_graph.match.pattern_file import load_patterns
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.reasons import refusal
from modegpt_graph.match.site_module import SiteModule
from modegpt_graph.match.sites import Analysis
from modegpt_graph.models import ModelSource, accepts_use_cache
from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.trace.export import Trace, TraceError, export, whole_model_call
from modegpt_graph.trace.precision import exporter

TOKENS = 7  # of the traced example: few, and a size that nothing else in a model has


@dataclass(frozen=True)
class Surveyed:
    """A model's skeleton, its trace and its sites. dtype: that of the model's own parameters."""

    skeleton: nn.Module
    trace: Trace
    survey: Survey
    patterns: tuple[Pattern, ...]
    example_inputs: tuple | None
    approximate_norm: bool = False
    dtype: torch.dtype | None = None

    def modules(self) -> tuple[SiteModule, ...]:
        """The smallest module of every site that can be decomposed, traced as the model calls it; traced once."""
        return self._found.modules

    @property
    def left(self) -> Mapping[str, str]:
        """Site id → why it is left as it is, although it could be decomposed: its module cannot be written anew."""
        return self._found.left

    @property
    def analysis(self) -> Analysis:
        """The analysis, with the sites that are left as they are refused."""
        left, analysis = self.left, self.survey.analysis
        sites = [
            replace(one.site, decomposition=None, reason=refusal(left[one.site.id]))
            if one.site.id in left
            else one.site
            for one in self.survey.located
        ]
        return replace(analysis, sites=tuple(site for one in sites for site in one.apart()))

    @cached_property
    def _found(self) -> Found:
        traced = dtype_of(self.skeleton)
        # The library's modules read nothing off their dtype but masks, which are made outside of them.
        own = self.dtype if self.example_inputs is not None else traced
        return site_modules(self.skeleton, self.survey, self.patterns, self.example_inputs, exporter(traced, own))


def read_patterns(extra: Iterable[str | Path] | None = None) -> tuple[Pattern, ...]:
    """The user's patterns, then the built-in ones; where both claim a matrix, the user's has it.

    A user's pattern takes the place of the built-in one of its name.
    """
    own = load_patterns(Path(path) for path in extra or ())
    names = {pattern.name for pattern in own}
    return (*own, *(pattern for pattern in load_patterns([patterns_directory()]) if pattern.name not in names))


def survey_model(
    source: ModelSource,
    patterns: Sequence[Pattern],
    progress: Progress | None = None,
    *,
    approximate_norm: bool = False,
) -> Surveyed:
    """Trace a model without its weights and find its sites. approximate_norm: see `survey`.

    The trace is in bfloat16, so that a cast back to the model's dtype is told from a cast to float32; in the model's
    own dtype where its code runs in no other (a table that it makes in float32 meets what is bfloat16).
    """
    progress = progress or NullProgress()
    with progress.stage("trace the model"):
        skeleton, trace = _first_traced(source)
    with progress.stage("match and certify"):
        found = survey(trace, patterns, source.name, source.architecture, approximate_norm=approximate_norm)
    dtype = dtype_of(source.skeleton())
    return Surveyed(skeleton, trace, found, tuple(patterns), source.example_inputs, approximate_norm, dtype)


def _first_traced(source: ModelSource) -> tuple[nn.Module, Trace]:
    """A model's skeleton and its trace, of one sequence where it takes so few: a cache may be of a fixed batch."""
    example = 1 if source.example_inputs is None else int(source.example_inputs[0].shape[0])
    failed: TraceError | None = None
    for batch in dict.fromkeys((1, example)):
        for dtype in (torch.bfloat16, None):
            try:
                return _traced(source, dtype, batch)
            except TraceError as error:
                failed = failed or error if batch == 1 and dtype is None else failed
    assert failed is not None
    raise failed


def _traced(source: ModelSource, dtype: torch.dtype | None, batch: int) -> tuple[nn.Module, Trace]:
    """A model's skeleton, its real numbers in `dtype` (as they are where None), and its trace."""
    skeleton: Any = source.skeleton()
    if dtype is not None:
        skeleton._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if source.config is not None:
        skeleton.config._attn_implementation = "eager"
    return skeleton, export(skeleton, _call(skeleton, source.example_inputs, batch))


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model's first floating-point parameter."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)


def _call(skeleton: nn.Module, example_inputs: tuple | None, batch: int):
    tokens = torch.zeros(batch, TOKENS, dtype=torch.long, device="meta")
    if example_inputs is not None:
        return whole_model_call(tokens, example_inputs[1:])
    return whole_model_call(tokens, keywords={"use_cache": False} if accepts_use_cache(skeleton) else {})
