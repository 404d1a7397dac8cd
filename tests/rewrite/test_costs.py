"""Four counts, each against a measurement that knows nothing of graphs or sites."""

from typing import Any

import pytest
import torch
from fixtures.families import family, tokens
from fixtures.library import build
from fixtures.nanogpt import factory
from torch.utils.flop_counter import FlopCounterMode

from modegpt_graph.compression import Prepared, prepare
from modegpt_graph.errors import InputError
from modegpt_graph.models import resolve
from modegpt_graph.rewrite.costs import BUDGETS

CONTEXT = 12


def prepared(model: Any, vocabulary: int = 64, **keywords: Any) -> Prepared:
    ids = tokens(vocabulary=vocabulary)
    return prepare(resolve(model, **keywords), calibration=ids, evaluating=False, context=CONTEXT)


def multiply_adds(model: Any) -> float:
    """Per token of a window of CONTEXT tokens, each of which meets every other: matrices and attention's products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(1, CONTEXT), use_cache=False)
    return counter.get_total_flops() / 2 / CONTEXT


def cached(model: Any) -> int:
    """Bytes of the tensors that a real cache holds after one token."""
    with torch.no_grad():
        cache = model(tokens(1, 1), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def stored(model: Any) -> int:
    return sum({value.data_ptr(): value.nbytes for value in model.state_dict().values()}.values())


@pytest.mark.parametrize("name", ["llama", "opt", "phi"])
def test_what_is_counted_is_what_is_measured_before_and_after(name: str) -> None:
    model = family(name)
    model.set_attn_implementation("eager")
    ready = prepared(model)
    totals = ready.decomposed.costs.totals
    assert totals["multiply-adds"] == pytest.approx(multiply_adds(model), rel=1e-9)
    assert totals["kv-cache"] == cached(model)
    assert totals["bytes"] == stored(model)
    result = ready.at(0.3, "uniform")
    assert result.report.outcome is not None
    found = result.report.outcome.reductions
    assert set(found) == set(BUDGETS)
    assert found["kv-cache"].after == cached(result.model) < cached(model)
    assert found["bytes"].after == stored(result.model)
    ranks = {site.id: site.rank for site in result.report.outcome.sites}
    # These two are measured: what the ranks say is the same, but for the indices that say which pairs each head kept.
    assert totals["kv-cache"] - ready.decomposed.removed(ranks, "kv-cache") == found["kv-cache"].after
    indices = sum(value.nbytes for value in result.model.state_dict().values() if not value.is_floating_point())
    assert totals["bytes"] - ready.decomposed.removed(ranks, "bytes") == found["bytes"].after - indices
    filled = [abs(ranks[f"{path}:query-key"] - ranks[f"{path}:value-output"]) for path in attention_of(ranks)]
    zeros = model.config.num_attention_heads * CONTEXT * sum(filled)  # that bring queries and values to one width
    assert found["multiply-adds"].after == pytest.approx(multiply_adds(result.model) - zeros, rel=1e-9)
    went = sum(site.parameters_before - site.parameters_after for site in result.report.outcome.sites)
    assert found["parameters"].before - found["parameters"].after == went


def attention_of(ranks: dict[str, int]) -> set[str]:
    return {site.rpartition(":")[0] for site in ranks if site.endswith("query-key")}


@pytest.mark.parametrize("budget", sorted(BUDGETS))
@pytest.mark.parametrize("allocator", ["curves", "uniform"])
def test_a_ratio_of_every_budget_is_met(budget: str, allocator: str) -> None:
    model: Any = build("llama", "cpu")
    ready = prepared(model)
    ratio = 0.25
    outcome = ready.at(ratio, allocator, budget).report.outcome
    assert outcome is not None
    assert outcome.budget == budget
    assert outcome.reductions[budget].share == pytest.approx(ratio, abs=0.005)
    free = [item.id for item in ready.decomposed.costs.items(ready.decomposed.items, budget) if not item.cost_per_rank]
    assert bool(free) == (budget == "kv-cache")  # the MLPs, which leave nothing in the cache
    assert all(site.rank == site.full_rank for site in outcome.sites if site.id in free)


def test_a_ratio_that_the_cache_cannot_give_is_refused_in_its_words() -> None:
    with pytest.raises(InputError, match=r"cannot be reached.*key/value cache's bytes"):
        prepared(family("llama")).at(0.94, "uniform", "kv-cache")
    with pytest.raises(InputError, match="unknown budget 'flops'; known: parameters, bytes"):
        prepared(family("llama")).at(0.3, "uniform", "flops")


def test_only_the_experts_that_a_token_goes_to_are_counted() -> None:
    """Two of four experts: half of what their matrices have."""
    model: Any = build("mixtral", "cpu")
    ready = prepared(model)
    experts = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 3)
    others = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    attention = sum(2 * model.config.hidden_size * CONTEXT for _ in range(model.config.num_hidden_layers))
    assert ready.decomposed.costs.totals["multiply-adds"] == others + experts // 2 + attention
    outcome = ready.at(0.3, "uniform", "multiply-adds").report.outcome
    assert outcome is not None
    assert outcome.reductions["multiply-adds"].share == pytest.approx(0.3, abs=0.005)


def test_a_model_without_a_cache_has_its_keys_and_values_counted_and_says_so() -> None:
    model, inputs = factory()
    ready = prepared(model, 32, example_inputs=inputs)
    costs = ready.decomposed.costs
    assert "keeps no key/value cache of its own" in costs.counted
    outcome = ready.at(0.5, "uniform", "kv-cache").report.outcome
    assert outcome is not None
    assert outcome.reductions["kv-cache"].share == pytest.approx(0.5, abs=0.005)
