"""Gram matrices: sums over every token, exact, and refused where they are not finite."""

from typing import Any

import pytest
import torch
from fixtures.families import shrunk

from modegpt_graph.calibrate.statistics import (
    Gram,
    OverflowedActivations,
    ScoreCollector,
    ScoreStatistics,
    collector,
)
from modegpt_graph.errors import ModegptError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 33])
def test_a_gram_matrix_is_that_of_all_rows_with_a_constant(size: int) -> None:
    gram = Gram(size)
    batches = [random(2, 5, size), random(3, size, seed=1), random(1, 1, size, seed=2)]
    for batch in batches:
        gram.add(batch)
    rows = torch.cat([batch.reshape(-1, size) for batch in batches])
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    assert torch.allclose(gram.augmented(), rows.T @ rows, rtol=1e-13, atol=1e-13)
    assert torch.equal(gram.augmented(), gram.augmented().T)
    assert gram.rows == 14


def test_float32_rows_are_summed_in_float64() -> None:
    """A large row and then many small ones, each far below the large one's last place in float32."""
    gram = Gram(1)
    gram.add(torch.tensor([[4096.0]]))
    for _ in range(100):
        gram.add(torch.tensor([[0.25]]))
    assert float(gram.augmented()[0, 0]) == 4096**2 + 100 * 0.0625


def collectors(name: str) -> list[tuple[Any, Any]]:
    return [(p, collector(p.footprint)) for module in shrunk(name).modules[:2] for p in module.placed]


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_queries_and_keys_are_summed_head_by_head(name: str) -> None:
    one = shrunk(name)
    config = one.dense.config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    placed, found = next((p, c) for p, c in collectors(name) if isinstance(c, ScoreCollector))
    size, group = placed.footprint.layout.size, heads // key_heads
    queries = [random(3, heads, 5, size), random(1, heads, 9, size, seed=1)]
    keys = [random(3, key_heads, 5, size, seed=2), random(1, key_heads, 9, size, seed=3)]
    for query, key in zip(queries, keys, strict=True):
        found.add("query", query)
        found.add("key", key)
    sums = found.statistics("here")
    assert isinstance(sums, ScoreStatistics)
    assert sums.queries.shape == (key_heads, group, size, size)
    for number in range(heads):
        rows = torch.cat([query[:, number].flatten(0, 1) for query in queries])
        assert torch.allclose(sums.queries[number // group, number % group], rows.T @ rows)
    for number in range(key_heads):
        rows = torch.cat([key[:, number].flatten(0, 1) for key in keys])
        assert torch.allclose(sums.keys[number], rows.T @ rows)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_values_that_are_not_finite_are_refused_with_where_and_what_to_do(bad: float) -> None:
    for placed, found in collectors("llama"):
        for name in found.nodes:
            width = found.nodes[name].meta["val"].shape
            value = torch.ones(*(2 if isinstance(size, torch.SymInt) else size for size in width))
            value[..., 0] = bad
            found.add(name, value)
        with pytest.raises(OverflowedActivations, match=r"non-finite entries after 4 tokens; the model") as error:
            found.statistics(placed.site.id)
        assert str(error.value).startswith(placed.site.id)
        assert "\n" not in str(error.value)
        assert error.value.exit_code == 2


def test_a_site_whose_queries_never_came_is_an_error() -> None:
    found = next(c for _, c in collectors("llama") if isinstance(c, ScoreCollector))
    with pytest.raises(ModegptError, match="layer 0: no query was seen"):
        found.statistics("layer 0")
