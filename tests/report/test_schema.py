import json

import pytest
from pydantic import ValidationError

from modegpt_graph.errors import InputError
from modegpt_graph.report.outcome import SiteOutcome
from modegpt_graph.report.schema import AnalysisJson, from_json, to_json

# The contract of `analyze --json`, spelt out here a second time on purpose: a change of either is a change for readers.
SITE = {
    "id": "layers.1.query-key",
    "pattern": "query-key",
    "variant": "sdpa",
    "type": "II",
    "paper_type": "II",
    "roles": {
        "query": {"parameter": "model.layers.1.self_attn.q_proj.weight", "rows": [[0, 576]]},
        "key": {"parameter": "model.layers.1.self_attn.k_proj.weight", "rows": [[0, 192]]},
    },
    "between": ["rotary (half-split)", "rotary (half-split)", "softmax"],
    "nonlinearities": 2,
    "commutant": "blocks",
    "block_size": 2,
    "certificate": {"method": "both", "max_error": 2.2e-16, "holds": True},
    "decomposition": "cr",
    "reason": "rotary embedding turns features in pairs (i, i + 32), so whole pairs are kept or dropped",
}


def test_an_analysis_is_written_field_by_field_as_the_contract_has_it(samples):
    report = to_json(samples.analysis(layers=2))
    assert list(report) == ["schema_version", "model", "sites", "unmatched", "coverage"]
    assert report["schema_version"] == 1
    assert report["model"] == {
        "name": "demo",
        "architecture": "LlamaForCausalLM",
        "parameters": 134_515_008,
        "decoder_linear_parameters": 106_168_320,
    }
    assert report["sites"][3] == SITE
    assert report["unmatched"] == []
    assert report["coverage"] == 1.0


def test_what_is_refused_or_unmatched_is_null_and_named(samples):
    report = to_json(samples.normed(layers=2))
    assert report["sites"][0]["decomposition"] is None
    assert report["sites"][0]["block_size"] is None
    assert report["sites"][0]["certificate"] == {"method": "both", "max_error": 0.81, "holds": False}
    assert report["unmatched"][0] == {
        "parameter": "model.layers.0.mlp.router.weight",
        "nearest_pattern": None,
        "reason": "after model.layers.0.mlp.router expected an element-wise operation, found topk",
    }


def test_a_compression_adds_ranks_to_the_sites_and_one_part_of_its_own(samples):
    analysis = samples.normed(layers=1)
    report = to_json(analysis, samples.outcome(analysis, search=samples.SEARCH))
    refused, value = report["sites"][:2]
    added = {
        "layer",
        "groups",
        "rank",
        "full_rank",
        "relative_error",
        "parameters_before",
        "parameters_after",
        "tokens",
        "bound",
        "bound_holds",
        "bound_curve",
    }
    assert set(value) - set(SITE) == added
    assert value["tokens"] is None
    assert (refused["rank"], refused["full_rank"], refused["relative_error"]) == (None, 128, None)
    assert (value["layer"], value["groups"], value["rank"], value["full_rank"]) == (0, 3, 29, 64)
    assert report["compression"] == {
        "ratio": 0.3,
        "preset": "default",
        "allocator": "block-influence",
        "seed": 0,
        "calibration": "32 windows of 1,024 of wikitext2 (train)",
        "fallback_reason": None,
        "ratios": {"decoder_linear": 0.3004, "without_embeddings": 0.3003, "all": 0.2371},
        "parameters": {"before": 134_515_008, "after": 102_622_000},
        "bytes": {"before": 538_060_032, "after": 410_488_000},
        "cache_bytes_per_token": {"before": 46_080, "after": 33_120},
        "seconds": {"calibrate": 61.4, "decompose": 12.2, "rewrite": 3.1, "evaluate": 88.0},
        "forward_passes": 1.74,
        "perplexity": {"dense": 17.79, "compressed": 35.38},
        "kl": 0.7123,
        "evaluation": "10 windows of 2,048 of wikitext2 (test)",
        "approximation": None,
        "budget": "parameters",
        "reductions": {
            "parameters": {"before": 106_168_320, "after": 74_317_824, "reduction": pytest.approx(0.3)},
            "bytes": {"before": 538_060_032, "after": 410_488_000, "reduction": pytest.approx(0.2371, abs=1e-4)},
            "multiply_adds": {
                "before": 205_228_800,
                "after": 150_000_000,
                "reduction": pytest.approx(0.2691, abs=1e-4),
            },
            "kv_cache": {"before": 46_080, "after": 33_120, "reduction": pytest.approx(0.28125)},
        },
        "context": 2048,
        "counted": "Multiply-adds are of one token.",
        "search": {
            "goal": "max_perplexity_increase",
            "limit": 1.0,
            "predicted": 0.95,
            "measured": 0.9888,
            "tries": [
                {"ratio": 0.4, "predicted": 0.9, "measured": 1.4},
                {"ratio": 0.3, "predicted": 0.95, "measured": 0.9888},
            ],
        },
        "choices": ["Features of mlp are chosen by leverage."],
        "reused": ["Statistics of the calibration text: from an earlier run, which took 61 s for it."],
    }


def test_what_was_not_measured_is_null(samples):
    analysis = samples.analysis(layers=1)
    unmeasured = {"perplexity_dense": None, "perplexity_compressed": None, "kl": None, "bytes_after": None}
    compression = to_json(analysis, samples.outcome(analysis, evaluation=None, **unmeasured))["compression"]
    assert compression["perplexity"] == {"dense": None, "compressed": None}
    assert compression["kl"] is None
    assert compression["evaluation"] is None
    assert compression["bytes"] == {"before": 538_060_032, "after": None}


@pytest.mark.parametrize("name", ["analysis", "normed"])
def test_a_written_report_reads_back_as_it_was(samples, name):
    analysis = getattr(samples, name)(layers=3)
    outcome = samples.outcome(analysis, search=samples.SEARCH)
    assert from_json(json.loads(json.dumps(to_json(analysis, outcome)))) == (analysis, outcome)


def test_unknown_fields_are_errors(samples):
    with pytest.raises(ValidationError, match="colour"):
        AnalysisJson.model_validate(to_json(samples.analysis(layers=1)) | {"colour": "red"})


def test_a_report_that_does_not_fit_names_the_file_and_the_field(samples):
    analysis = samples.analysis(layers=1)
    report = to_json(analysis, samples.outcome(analysis))
    report["sites"][0]["commutant"] = "everything"
    with pytest.raises(InputError, match=r"out/report\.json is not a report of this version: sites\.0\.commutant"):
        from_json(report, where="out/report.json")


def test_an_outcome_of_a_site_that_is_not_there_is_an_error(samples):
    analysis = samples.analysis(layers=1)
    stray = SiteOutcome("layers.9.mlp", 1, 2, None, 3, 4)
    with pytest.raises(ValueError, match=r"layers\.9\.mlp"):
        to_json(analysis, samples.outcome(analysis, sites=(stray,)))
