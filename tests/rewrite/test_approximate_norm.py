"""Queries and keys under a norm of each head: refused unless asked for; then approximated, with a measured error."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.library import build
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import modegpt_graph as mg
from modegpt_graph.match.approximate import norms_of
from modegpt_graph.models import forward_logits
from modegpt_graph.rewrite.approximate_norm import _Side

NAMES = ("qwen3", "gemma3")
TOKENS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))  # few: all of them are sampled


def query_keys(report: Any) -> list[Any]:
    return [site for site in report.sites if site.pattern == "query-key"]


def compressed(model: nn.Module, ratio: float = 0.3) -> Any:
    return mg.compress(model, ratio, calibration=TOKENS, allocator="uniform", evaluate=False, approximate_norm=True)


@pytest.fixture
def operands() -> Iterator[Callable[[Any], tuple[Tensor, Tensor]]]:
    """Queries (T, H, d) and keys (T, G, d) of the first layer, as the model hands them to its attention function."""
    seen: list[tuple[Tensor, Tensor]] = []
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def recorded(module: Any, query: Tensor, key: Tensor, *rest: Any, **keywords: Any) -> Any:
        seen.append((query.transpose(1, 2).flatten(0, 1).double(), key.transpose(1, 2).flatten(0, 1).double()))
        return inner(module, query, key, *rest, **keywords)

    def of(model: Any) -> tuple[Tensor, Tensor]:
        seen.clear()
        before = model.config._attn_implementation
        model.config._attn_implementation = "recorded"
        with torch.no_grad():
            forward_logits(model, TOKENS)
        model.config._attn_implementation = before
        return seen[0]

    ALL_ATTENTION_FUNCTIONS["recorded"] = recorded
    yield of
    del ALL_ATTENTION_FUNCTIONS["recorded"]


def logits(queries: Tensor, keys: Tensor) -> Tensor:
    """(H, T, T) products of every query with every key."""
    return torch.einsum("shd,thd->hst", queries, keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused_by_name_unless_asked_for(name: str) -> None:
    model = build(name)
    for site in query_keys(mg.analyze(model)):
        assert site.decomposition is None
        assert site.reason.startswith("refused: the norms `q_norm` and `k_norm`")
        assert "; found: with feature 0 set to zero, feature" in site.reason
    for site in query_keys(mg.analyze(model, approximate_norm=True)):
        assert (site.decomposition, site.commutant, site.block_size) == ("cr", "none", 2)
        assert site.reason.startswith("approximated, not proven: under the norms `q_norm` and `k_norm`")
        assert not site.certificate.holds


def test_a_norm_across_heads_is_not_approximated() -> None:
    for site in query_keys(mg.analyze(build("olmo2"), approximate_norm=True)):
        assert site.decomposition is None
        assert "not approximated: `pow` is summed over more than the features of a head" in site.reason


@pytest.mark.parametrize("name", NAMES)
def test_the_reported_error_is_the_one_that_the_model_makes(name: str, operands) -> None:
    model = build(name, "cpu")
    result = compressed(model)
    outcome = next(one for one in result.report.outcome.sites if one.id.endswith("layers.0.self_attn:query-key"))
    assert outcome.rank < outcome.full_rank
    dense, smaller = logits(*operands(model)), logits(*operands(result.model))
    measured = float((dense - smaller).square().sum() / dense.square().sum())
    # float32 activations of the tiny model, squared and summed in float64.
    assert outcome.relative_error == pytest.approx(measured, rel=1e-4)
    assert 0 < measured < 1


@pytest.mark.parametrize("name", NAMES)
def test_the_factor_of_a_head_is_the_best_one(name: str, operands) -> None:
    model = build(name, "cpu")
    dense, smaller = logits(*operands(model)), logits(*operands(compressed(model).model))
    best = (dense * smaller).sum((1, 2)) / smaller.square().sum((1, 2))
    torch.testing.assert_close(best, torch.ones_like(best), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_loaded_and_generates_as_before(name: str, tmp_path: Path) -> None:
    result = compressed(build(name, "cpu"))
    result.save(tmp_path / "small")
    loaded: Any = mg.load(tmp_path / "small")
    with torch.no_grad():
        # The attention kernels differ: the library's eager one as built here, a fused one as loaded.
        torch.testing.assert_close(forward_logits(loaded, TOKENS), forward_logits(result.model, TOKENS))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS), "pad_token_id": 0}
    assert torch.equal(loaded.generate(TOKENS, **settings), result.model.generate(TOKENS, **settings))
    assert "made smaller by an approximation, not proven" in result.report.outcome.approximation


def test_at_full_rank_it_changes_nothing() -> None:
    proof = mg.verify(build("qwen3", "cpu"), approximate_norm=True)
    assert proof.sites == len(mg.analyze(build("qwen3"), approximate_norm=True).sites)
    assert proof.max_relative_error < 1e-5
    assert proof.generation_identical


def test_the_report_says_whether_it_paid() -> None:
    model = build("qwen3", "cpu")
    text = TOKENS.repeat(4, 1)
    result = mg.compress(model, 0.3, calibration=text, evaluate=False, approximate_norm=True)
    assert result.report.to_json()["compression"]["approximation"] == result.report.outcome.approximation
    assert mg.compress(model, 0.1, calibration=TOKENS, evaluate=False).report.outcome.approximation is None


def test_what_is_kept_is_weighed_to_predict_what_the_norm_misses() -> None:
    result = compressed(build("qwen3", "cpu"))
    placed = next(p for one in result._surveyed.modules() for p in one.placed if p.site.is_approximated)
    norm = next(iter(norms_of(placed.footprint).values()))
    half = torch.randn(64, 1, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = torch.cat([half, torch.linspace(0.1, 3.0, 8) * half], dim=-1)  # (T, G, g, d): half follow the others
    side = _Side(features * norm.factor(features.square()), features.square(), norm)
    kept = torch.arange(8)[None]
    scales = side.scales(kept, kept)
    exact = side.sample_of(kept)
    weighed, equal = ((side.kept(kept, one) / exact).log().abs().max() for one in (scales, torch.ones_like(scales)))
    assert weighed < 0.1 < equal  # in logarithms; the ridge towards equal weights keeps it from being exact
