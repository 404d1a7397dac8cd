"""Which modules are traced on their own: the smallest that hold a site, and one where they lie in each other."""

import pytest
import torch
from fixtures import nested

import modegpt_graph as mg
from modegpt_graph.calibrate.observe import calibrate
from modegpt_graph.calibrate.statistics import ConsumerStatistics, ScoreStatistics
from modegpt_graph.match.decoder import decoder_layers
from modegpt_graph.match.prepare import Surveyed, read_patterns, survey_model
from modegpt_graph.models import resolve


def surveyed(fused: bool, activation: bool) -> Surveyed:
    model, inputs = nested.decoder(fused, activation)
    return survey_model(resolve(model, example_inputs=inputs), read_patterns())


@pytest.mark.parametrize(
    ("fused", "activation", "paths"),
    [
        (False, True, ["", ".attention"]),  # the layer keeps its own forward method: nothing in it is inlined
        (False, False, [""]),
        (True, True, [""]),
        (True, False, [""]),
    ],
)
def test_modules_that_lie_in_one_that_is_written_anew_are_one_with_it(
    fused: bool, activation: bool, paths: list[str]
) -> None:
    modules = surveyed(fused, activation).modules()
    assert sorted(one.path for one in modules) == sorted(f"layers.{n}{path}" for n in range(2) for path in paths)
    sites = {placed.site.pattern for one in modules for placed in one.placed}
    assert sites == {"query-key", "value-output", "mlp" if activation else "gated-mlp"}


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_nested_is_observed_and_rewritten(fused: bool) -> None:
    model, inputs = nested.decoder(fused)
    assert mg.verify(model, example_inputs=inputs).max_relative_error < 1e-5
    found = surveyed(fused, activation=False)
    tokens = torch.randint(nested.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))
    statistics = calibrate(model, found.modules(), decoder_layers(found.trace), tokens).statistics
    assert len(statistics) == 6
    for one in statistics.values():
        assert isinstance(one, ConsumerStatistics | ScoreStatistics)
        grams = one.gram if isinstance(one, ConsumerStatistics) else one.keys
        assert float(grams.diagonal(dim1=-2, dim2=-1).min()) > 0
    result = mg.compress(model, 0.3, calibration=tokens, example_inputs=inputs)
    with torch.no_grad():
        assert torch.isfinite(result.model(*inputs)).all()
    assert result.report.outcome.ratios.decoder_linear == pytest.approx(0.3, abs=0.02)


def test_a_site_whose_module_cannot_be_traced_alone_is_left_and_the_others_are_not() -> None:
    model, inputs = nested.opened()
    tokens = torch.randint(nested.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))
    analysed = {site.id: (site.decomposition, site.reason) for site in mg.analyze(model, example_inputs=inputs).sites}
    proof = mg.verify(model, example_inputs=inputs)
    assert (proof.sites, proof.max_relative_error < 1e-5) == (4, True)  # query/key and value/output of two layers
    report = mg.compress(model, 0.206, calibration=tokens, example_inputs=inputs).report
    assert {site.id: (site.decomposition, site.reason) for site in report.sites} == analysed
    left = [site for site in report.sites if site.pattern == "gated-mlp"]
    assert len(left) == 2
    for site in left:
        assert site.decomposition is None
        assert site.reason.startswith("refused: its module cannot be written anew: "), site.reason
        assert "SimpleNamespace" in site.reason
