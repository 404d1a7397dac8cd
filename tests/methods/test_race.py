"""Every method is asked for the same ratio of the same parameters, and what it cannot do is a reason."""

import pytest
import torch
from fixtures.families import family, tokens

import modegpt_graph as mg
from modegpt_graph import api
from modegpt_graph.methods.names import METHODS
from modegpt_graph.methods.registry import PASSES

BY_LAYER = ("shortgpt", "sleb")  # a tiny model has two layers: half of it is the nearest they come


def test_every_method_that_is_named_exists() -> None:
    assert list(PASSES) == list(METHODS)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in BY_LAYER])
def test_the_ratio_asked_for_is_met(name: str, method: str, setting) -> None:
    one = setting(name)
    smaller = PASSES[method](one)(0.4)
    # Units of tiny models are coarse: one head is 12 % of a layer.
    assert smaller.removed / one.total == pytest.approx(0.4, abs=0.03)
    with torch.no_grad():
        before, after = one.dense(one.tokens[:1]).logits, smaller.model(one.tokens[:1]).logits
    assert torch.isfinite(after).all()
    assert not torch.allclose(before, after, atol=1e-3)


def test_one_table_for_all() -> None:
    model = family("llama")
    found = api.compare_methods(
        model, ["ours", "shortgpt"], [0.2, 0.5], calibration=tokens(8, 32), text=tokens(4, 32, seed=5)
    )
    assert found.methods == ("ours", "shortgpt")
    assert [entry.ratio for entry in found.entries] == [0.2, 0.5, 0.2, 0.5]
    assert found.perplexity_dense == pytest.approx(api.evaluate(model, tokens(4, 32, seed=5)).perplexity)
    assert all(entry.reason is None and entry.perplexity is not None for entry in found.entries)


def test_ours_is_what_compress_does() -> None:
    model, ids, text = family("llama"), tokens(8, 32), tokens(4, 32, seed=5)
    (entry,) = api.compare_methods(model, ["ours"], [0.4], calibration=ids, text=text).entries
    result = mg.compress(model, 0.4, calibration=ids, evaluate=False)
    assert entry.perplexity == pytest.approx(api.evaluate(result.model, text).perplexity, rel=1e-6)
    outcome = result.report.outcome
    assert outcome is not None
    assert entry.achieved == outcome.ratios.decoder_linear
