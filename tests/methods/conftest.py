from collections.abc import Callable
from typing import Any

import pytest
from fixtures.families import family, tokens
from torch import nn

from modegpt_graph.calibrate.observe import calibrate
from modegpt_graph.calibrate.text import Calibration
from modegpt_graph.match.decoder import decoder_layers
from modegpt_graph.match.prepare import read_patterns, survey_model
from modegpt_graph.methods.common import Setting
from modegpt_graph.methods.matrices import matrix_sizes
from modegpt_graph.models import resolve
from modegpt_graph.progress import NullProgress


@pytest.fixture(scope="session")
def setting() -> Callable[..., Setting]:
    """Builds what methods are given, for a tiny model by family name or as it is; each family once."""
    known: dict[str, Setting] = {}

    def build(model: Any) -> Setting:
        if not isinstance(model, str):
            return _setting(model)
        if model not in known:
            known[model] = _setting(family(model))
        return known[model]

    return build


def _setting(model: Any) -> Setting:
    vocabulary = next(part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding))
    ids = tokens(8, 32, vocabulary=vocabulary)
    surveyed = survey_model(
        resolve(model, example_inputs=None if hasattr(model, "config") else (ids,)), read_patterns()
    )
    modules, layers = surveyed.modules(), decoder_layers(surveyed.trace)
    observed = calibrate(model, modules, layers, ids, value_inputs=True)
    sizes, text = matrix_sizes(surveyed.trace), Calibration(ids, "random tokens")
    return Setting(model, surveyed, modules, layers, sizes, text, observed, 0, NullProgress())
