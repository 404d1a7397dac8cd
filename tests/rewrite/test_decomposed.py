"""One decomposition serves every ratio: asking for one changes nothing for the next."""

import math

import pytest
import torch
from fixtures.families import family, tokens
from fixtures.library import build

import modegpt_graph as mg
from modegpt_graph.compression import prepare
from modegpt_graph.errors import InputError
from modegpt_graph.models import forward_logits, resolve
from modegpt_graph.rewrite.recalibrated import DEEPER, LEFT
from modegpt_graph.rewrite.scaling import find_scalings


@pytest.mark.parametrize("allocator", ["curves", "uniform"])
def test_a_ratio_gives_the_same_model_whatever_was_asked_before(allocator: str) -> None:
    model, ids = family("llama"), tokens()
    prepared = prepare(resolve(model), calibration=ids)
    for ratio in (0.5, 0.2, 0.3):
        found = prepared.at(ratio, allocator).model
        fresh = mg.compress(model, ratio, calibration=ids, allocator=allocator, evaluate=False).model
        assert {name: value.shape for name, value in found.state_dict().items()} == {
            name: value.shape for name, value in fresh.state_dict().items()
        }
        with torch.no_grad():
            assert torch.equal(forward_logits(found, ids), forward_logits(fresh, ids))


def test_what_goes_is_what_the_ranks_say() -> None:
    model, ids = family("llama"), tokens()
    decomposed = prepare(resolve(model), calibration=ids).decomposed
    ranks = decomposed.ranks(0.4, "uniform")
    smaller, _ = decomposed.model(decomposed.solutions(ranks))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert decomposed.removed(ranks) == count - sum(parameter.numel() for parameter in smaller.parameters())
    assert decomposed.removed(ranks) / decomposed.total == pytest.approx(0.4, abs=0.005)


def test_sites_that_are_left_out_stay_whole_and_the_others_give_it_all() -> None:
    decomposed = prepare(resolve(family("llama")), calibration=tokens()).decomposed
    mlps = {item.id for item in decomposed.items if item.full_rank == 48}
    assert mlps
    ranks = decomposed.ranks(0.2, "uniform", without=mlps)
    assert all((ranks[item.id] == item.full_rank) == (item.id in mlps) for item in decomposed.items)
    assert decomposed.removed(ranks) / decomposed.total == pytest.approx(0.2, abs=0.005)
    with pytest.raises(InputError, match="cannot be reached"):
        decomposed.ranks(0.9, "uniform", without=mlps)


def test_sites_with_a_producer_that_recalibration_fits_give_more_where_it_follows() -> None:
    decomposed = prepare(resolve(family("llama")), calibration=tokens()).decomposed
    scaled = {site for site, weight in decomposed.reached.items() if weight < 1}
    assert scaled == {item.id for item in decomposed.items if item.full_rank == 48}
    assert decomposed.reached.keys() > scaled
    alone, followed = (decomposed.ranks(0.4, recalibrates=again) for again in (False, True))
    assert sum(followed[site] for site in scaled) < sum(alone[site] for site in scaled)
    assert decomposed.removed(followed) / decomposed.total == pytest.approx(0.4, abs=0.005)
    weights = [decomposed.reached[item.id] for item in decomposed.items if item.id in scaled]
    assert weights[1] / weights[0] == pytest.approx(math.exp(DEEPER))
    assert math.prod(weights) ** 0.5 == pytest.approx(LEFT)
    said = f"{weights[0]:.2f} to {weights[1]:.2f} times, the more the deeper they lie, at 2 of 6"
    assert sum(said in one for one in decomposed.said("curves", recalibrates=True)) == 1
    assert not any(said in one for one in decomposed.said("uniform", recalibrates=True))
    assert not any(said in one for one in decomposed.said("curves", recalibrates=False))


def test_of_a_single_layer_it_is_not_said_that_deeper_ones_count_more() -> None:
    model = family("llama")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    decomposed = prepare(resolve(model), calibration=tokens()).decomposed
    said = " ".join(decomposed.said("curves", recalibrates=True))
    assert f"What sites do to the logits counts {LEFT:.2f} times at 1 of 3 when the ratio is spread" in said


def test_ranks_are_the_same_where_no_producer_is_fitted() -> None:
    decomposed = prepare(resolve(family("opt")), calibration=tokens()).decomposed
    assert decomposed.reached
    assert set(decomposed.reached.values()) == {1.0}
    assert decomposed.ranks(0.4) == decomposed.ranks(0.4, recalibrates=True)


def test_sites_with_a_producer_that_is_fitted_give_as_much_as_ever_behind_a_norm() -> None:
    model = build("gemma2", "cpu")
    for layer in model.model.layers:  # what a norm adds under its root is not to tell
        layer.self_attn.o_proj.weight.data *= 1e4
        layer.mlp.down_proj.weight.data *= 1e4
    ids = torch.randint(0, 24, (16, 64), generator=torch.Generator().manual_seed(0))
    decomposed = prepare(resolve(model), calibration=ids, evaluating=False).decomposed
    mlps = [f"model.layers.{number}.mlp" for number in range(len(model.model.layers))]
    producers = {f"{mlp}.down_proj": [f"{mlp}.gate_proj", f"{mlp}.up_proj"] for mlp in mlps}
    assert find_scalings(decomposed.dense, producers, ids[:1]).keys() == producers.keys()
    weights = list(decomposed.reached.values())
    assert weights == [1.0] * 2 * len(model.model.layers)
    assert not any("counts" in one for one in decomposed.said("curves", recalibrates=True))
