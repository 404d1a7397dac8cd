"""A goal is met: a perplexity by measurement, a size by the file that is written."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.families import family, tokens
from fixtures.nanogpt import factory
from torch import Tensor

import modegpt_graph as mg
from modegpt_graph.checkpoint import weights_size
from modegpt_graph.compression import Prepared, prepare
from modegpt_graph.errors import InputError
from modegpt_graph.evaluate import perplexity
from modegpt_graph.goals import bytes_of, share_of, within_perplexity, within_size
from modegpt_graph.models import forward_logits, resolve


@torch.no_grad()
def spoken(model: Any, windows: int = 24, window: int = 16) -> Tensor:
    """Text that the model itself samples, which it therefore predicts well, and worse when it is damaged."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (windows, 1), generator=generator)
    while ids.shape[1] < window:
        chances = forward_logits(model, ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return ids


@cache
def ready() -> Prepared:
    model = family("llama")
    return prepare(resolve(model), calibration=spoken(model), of_tokens=True)


def written(result: mg.Result, folder: Path) -> int:
    result.save(folder)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("increase", [0.1, 0.5])
def test_the_measured_increase_is_within_the_one_asked_for(increase: float) -> None:
    one = ready()
    result = within_perplexity(one, increase, "curves", "parameters")
    outcome = result.report.outcome
    assert outcome is not None
    assert outcome.search is not None
    assert one.held_out is not None
    before, after = (perplexity(model, one.held_out) for model in (one.decomposed.dense, result.model))
    assert 0 < after / before - 1 <= increase
    last = outcome.search.tries[-1]
    assert last.measured == pytest.approx(after / before - 1, abs=1e-6)
    assert last.ratio == outcome.ratio
    assert outcome.ratios.decoder_linear == pytest.approx(outcome.ratio, abs=0.01)
    report = result.report.to_json()["compression"]["search"]
    assert report["goal"] == "max_perplexity_increase"
    assert [report["limit"], report["predicted"], report["measured"]] == [increase, last.predicted, last.measured]


def test_more_allowed_is_more_removed() -> None:
    ratios = []
    for increase in (0.1, 0.5):
        outcome = within_perplexity(ready(), increase, "uniform", "bytes").report.outcome
        assert outcome is not None
        assert outcome.budget == "bytes"
        ratios.append(outcome.ratio)
    assert ratios[0] < ratios[1]


def test_windows_of_token_ids_are_held_out_when_a_measurement_needs_them() -> None:
    model = family("llama")
    result = mg.compress(model, max_perplexity_increase=0.3, calibration=spoken(model), evaluate=False)
    outcome = result.report.outcome
    assert outcome is not None
    assert outcome.perplexity_dense is not None
    assert outcome.perplexity_compressed is not None
    assert outcome.perplexity_compressed <= 1.3 * outcome.perplexity_dense * (1 + 1e-6)
    assert "6 of them held out" in outcome.calibration
    with pytest.raises(InputError, match="no windows are left"):
        mg.compress(model, max_perplexity_increase=0.3, calibration=tokens(1, 16))


@pytest.mark.parametrize("share", [0.9, 0.6])
@pytest.mark.parametrize(("budget", "allocator"), [("parameters", "curves"), ("kv-cache", "uniform")])
def test_a_size_is_met_from_below_and_as_near_as_one_step_allows(
    tmp_path: Path, share: float, budget: str, allocator: str
) -> None:
    one = ready()
    full = weights_size(one.decomposed.dense)
    size = int(full * (share if budget == "parameters" else 0.97 + share / 50))
    result = within_size(one, size, allocator, budget)
    found = written(result, tmp_path / "small")
    costs = one.decomposed.costs
    step = max(item.cost_per_rank * item.multiple for item in costs.items(one.decomposed.items, "bytes"))
    assert size - step < found <= size
    outcome = result.report.outcome
    assert outcome is not None
    assert outcome.search is not None
    assert outcome.search.tries[-1].measured == found
    assert outcome.search.goal == "target_size"


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path: Path, name: str) -> None:
    result = mg.compress(family(name), 0.3, calibration=tokens(), allocator="uniform", evaluate=False)
    assert written(result, tmp_path / "small") == weights_size(result.model)


def test_so_it_is_for_a_module_that_is_not_from_transformers(tmp_path: Path) -> None:
    model, inputs = factory()
    size = int(0.8 * weights_size(model))
    result = mg.compress(
        model, target_size=size, calibration=tokens(vocabulary=32), example_inputs=inputs, allocator="uniform"
    )
    assert weights_size(result.model) == written(result, tmp_path / "small") <= size


def test_goals_that_cannot_be_met_say_why() -> None:
    full = weights_size(ready().decomposed.dense)
    with pytest.raises(InputError, match=f"have {full:,} bytes already"):
        within_size(ready(), full, "uniform", "parameters")
    with pytest.raises(InputError, match="at least"):
        within_size(ready(), 5_000, "uniform", "parameters")
    with pytest.raises(InputError, match="outside"):
        mg.compress("no such model", max_perplexity_increase=0.0)
    for wanted in ({}, {"ratio": 0.3, "target_size": "1MB"}, {"ratio": 0.3, "max_perplexity_increase": 0.1}):
        with pytest.raises(InputError, match="exactly one"):
            mg.compress("no such model", **wanted)


@pytest.mark.parametrize(
    ("said", "meant"),
    [("100MB", 100_000_000), ("1.5 GB", 1_500_000_000), ("300kB", 300_000), ("2MiB", 2 << 20), (12_345, 12_345)],
)
def test_sizes_are_read_as_people_write_them(said: int | str, meant: int) -> None:
    assert bytes_of(said) == meant


def test_shares_are_read_as_people_write_them() -> None:
    assert [share_of(text) for text in ("10%", "10 %", "0.1", ".5%")] == pytest.approx([0.1, 0.1, 0.1, 0.005])
    for text in ("ten", "-5%", "", "10%%"):
        with pytest.raises(InputError, match="no share"):
            share_of(text)
    assert share_of("1000%") == pytest.approx(10)
    with pytest.raises(InputError, match="10 is a share of 1000%; write 10% for 10 in a hundred"):
        share_of("10")  # ten per cent is what was meant
    for text in ("big", "-1MB", "10 XB", "0"):
        with pytest.raises(InputError):
            bytes_of(text)
