"""Decoders that keep keys and values themselves: the cache shrinks with the heads, and is right at every position."""

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import own_caches
from torch import Tensor, nn

import modegpt_graph as mg
from modegpt_graph.match.prepare import Surveyed, read_patterns, survey_model
from modegpt_graph.models import resolve
from modegpt_graph.rewrite.apply import rewrite
from modegpt_graph.rewrite.solution import shuffled

TOLERANCE = 1e-5  # of the largest logit, float32: sums in another order move it by about 1e-6
STYLES = [own_caches.Attention, own_caches.InAttributes, own_caches.AtPositions]
TOKENS = torch.randint(own_caches.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))


@lru_cache
def surveyed(attention: type[nn.Module]) -> Surveyed:
    model, example_inputs = own_caches.decoder(attention)
    return survey_model(resolve(model, example_inputs=example_inputs), read_patterns())


@lru_cache
def compressed(attention: type[nn.Module]) -> Any:
    model, example_inputs = own_caches.decoder(attention)
    return mg.compress(model, 0.4, calibration=TOKENS, example_inputs=example_inputs, allocator="uniform")


def caches(model: nn.Module) -> list[Tensor]:
    """The keys and the values that a decoder's block keeps."""
    attention: Any = model.get_submodule("blocks.0.attention")
    cache = getattr(attention, "cache", None)
    return [attention.cache_k, attention.cache_v] if cache is None else [cache.k_cache, cache.v_cache]


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("attention", STYLES)
def test_its_sites_are_found_and_proven(attention: type[nn.Module]) -> None:
    analysis = surveyed(attention).analysis
    kinds = {one.pattern: (one.type, one.commutant) for one in analysis.sites}
    assert kinds == {"query-key": ("II", "blocks"), "value-output": ("III", "linear"), "mlp": ("I", "columns")}
    assert all(one.certificate.method == "both" and one.certificate.holds for one in analysis.sites)
    assert [one.reason for one in analysis.sites if one.decomposition is None] == []
    assert analysis.coverage == 1


@torch.no_grad()
@pytest.mark.parametrize("attention", [*STYLES, own_caches.Prefixed, own_caches.Past])
def test_a_shuffled_rewrite_changes_nothing_in_one_pass_or_in_steps(attention: type[nn.Module]) -> None:
    model, _ = own_caches.decoder(attention)
    modules, generator = surveyed(attention).modules(), torch.Generator().manual_seed(0)
    chosen = {p.site.id: shuffled(p.footprint.layout, generator) for one in modules for p in one.placed}
    assert len(chosen) == 3
    changed = copy.deepcopy(model)
    rewrite(changed, modules, chosen)
    expected, found = own_caches.steps(model, TOKENS), own_caches.steps(changed, TOKENS)
    assert difference(found, expected) < TOLERANCE
    assert difference(changed(TOKENS), model(TOKENS)) < TOLERANCE
    assert difference(changed(TOKENS[:1, :1]), model(TOKENS[:1, :1])) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("attention", STYLES)
def test_a_smaller_cache_is_right_at_every_position_also_when_loaded(
    attention: type[nn.Module], tmp_path: Path
) -> None:
    model, _ = own_caches.decoder(attention)
    small = compressed(attention).model
    features = own_caches.HEAD_DIM
    assert [cache.shape[:-1] for cache in caches(small)] == [cache.shape[:-1] for cache in caches(model)]
    assert all(cache.shape[-1] < features for cache in caches(small))
    compressed(attention).save(tmp_path / "small")
    loaded = mg.load(tmp_path / "small", factory=lambda: own_caches.decoder(attention))
    whole = small(TOKENS)
    assert 1e-3 < difference(whole, model(TOKENS)) < 1
    assert difference(own_caches.steps(small, TOKENS), whole) < TOLERANCE
    assert torch.equal(loaded(TOKENS), whole)
    assert torch.equal(own_caches.steps(loaded, TOKENS), own_caches.steps(small, TOKENS))


@torch.no_grad()
def test_what_is_in_a_cache_is_what_the_smaller_model_would_have_written() -> None:
    """Compressed between two calls, a model goes on where it was."""
    model, example_inputs = own_caches.decoder(own_caches.Attention)
    small = compressed(own_caches.Attention)
    own_caches.steps(small.model, TOKENS)
    model(TOKENS[:, :12])
    going_on = mg.compress(model, 0.4, calibration=TOKENS, example_inputs=example_inputs, allocator="uniform").model
    for cache, other in zip(caches(going_on), caches(small.model), strict=True):
        assert difference(cache[:2, :12], other[:2, :12]) < TOLERANCE


@torch.no_grad()
def test_a_cache_that_comes_after_compression_is_not_ignored() -> None:
    small: Any = compressed(own_caches.SetUpLater).model
    small(TOKENS)
    small.blocks[0].attention.cache = own_caches.KeyValueCache()
    with pytest.raises(ValueError, match="this module was compressed without cache"):
        small(TOKENS)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (own_caches.ReadByNorm, "the features are also read by `abs_1` (abs)"),
        (own_caches.FeaturesIndexed, "what `index_put` does to them is not known"),
        (own_caches.Counting, "each call changes its attribute `blocks.0.attention.count`: keep it in a buffer"),
        (own_caches.Growing, "it keeps `keys`, computed from what it is given, for later calls: register a buffer"),
    ],
)
def test_what_cannot_be_kept_smaller_is_refused_with_the_reason(attention: type[nn.Module], reason: str) -> None:
    found = {one.pattern: one for one in surveyed(attention).analysis.sites}
    assert found["query-key"].decomposition is None
    assert reason in found["query-key"].reason
