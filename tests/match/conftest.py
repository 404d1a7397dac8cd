import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from modegpt_graph.match.analyse import Survey, survey
from modegpt_graph.match.pattern_file import load_patterns
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.trace.export import Trace, export, whole_model_call

sys.path.insert(0, str(Path(__file__).parents[1]))  # `from fixtures import …`: the models that these rooms share

PATTERNS = Path(__file__).parents[2] / "patterns"


@pytest.fixture(scope="session")
def patterns() -> tuple[Pattern, ...]:
    return load_patterns([PATTERNS])


@pytest.fixture(scope="session")
def traced() -> Callable[[Callable[[], nn.Module]], Trace]:
    """Builds a hand-written model on the meta device and traces it."""

    def trace(build: Callable[[], nn.Module]) -> Trace:
        with torch.device("meta"):
            model = build().eval()
        return export(model, whole_model_call(torch.zeros(1, 7, dtype=torch.long, device="meta")))

    return trace


@pytest.fixture(scope="session")
def library_trace() -> Callable[[str], Trace]:
    """Traces a tiny model of the transformers library, by its name in fixtures/library.py."""
    from fixtures.library import build

    @cache
    def trace(name: str) -> Trace:
        ids = torch.zeros(1, 7, dtype=torch.long, device="meta")
        return export(build(name), whole_model_call(ids, keywords={"use_cache": False}))

    return trace


@pytest.fixture(scope="session")
def library_survey(patterns: tuple[Pattern, ...], library_trace: Callable[[str], Trace]) -> Callable[[str], Survey]:
    """Surveys a tiny model of the transformers library with the patterns of the package."""

    @cache
    def of(name: str) -> Survey:
        return survey(library_trace(name), patterns, name, name)

    return of
