"""Scores against direct evaluation on the inputs themselves, and models against what they should compute."""

from typing import Any

import pytest
import torch
from fixtures.families import FAMILIES
from torch import Tensor, nn

from modegpt_graph.methods.structured import flap, fluctuation, magnitude, uniform, wanda, wanda_scores
from modegpt_graph.methods.units import Units, units_of, without


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (T, N), a matrix (N, D), and the Gram matrix of [X, 1]."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 7, generator=generator, dtype=torch.float64) * torch.arange(1, 8) + 3
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    augmented = torch.cat([inputs, torch.ones(50, 1, dtype=torch.float64)], dim=1)
    return inputs, weight, augmented.T @ augmented


def test_wanda_score_is_weight_times_input_norm(layer) -> None:
    inputs, weight, gram = layer
    expected = [sum(abs(float(weight[j, i])) * float(inputs[:, j].norm()) for i in range(5)) for j in range(7)]
    torch.testing.assert_close(wanda_scores(gram, weight), torch.tensor(expected, dtype=torch.float64))


def test_flap_score_is_the_fluctuation_of_the_output(layer) -> None:
    """What a feature's own contribution to the output varies: the error that a bias cannot make good."""
    inputs, weight, gram = layer
    for j, score in enumerate(fluctuation(gram, weight).tolist()):
        assert score == pytest.approx(float(torch.outer(inputs[:, j], weight[j]).var(dim=0).sum()))


def consumer(model: Any, one: Units) -> nn.Module:
    (linear,) = one.placed.footprint.outline.consumers.values()
    return model.get_submodule(one.module.path).get_submodule(linear.weight.rpartition(".")[0])


def output_of(model: Any, one: Units, tokens: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = consumer(model, one).register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, -2)


def inputs_of(model: Any, one: Units, tokens: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = consumer(model, one).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, -2).double()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("compensate", [False, True])
def test_a_pruned_site_puts_out_what_its_kept_units_do(name: str, compensate: bool, setting) -> None:
    """The first unit of each site is dropped: its features are zero, or what they are on average."""
    one = setting(name)
    for units in units_of(one):
        if units.count == 1:
            continue
        smaller = without(one, [units], {units.site: torch.arange(1, units.count)}, compensate=compensate)
        features = inputs_of(one.dense, units, one.tokens)
        lost = features[:, units.columns[0]]
        lost = lost - lost.mean(0) if compensate else lost
        expected = output_of(one.dense, units, one.tokens).double() - lost @ units.weight[units.columns[0]]
        found = output_of(smaller.model, units, one.tokens).double()
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        assert smaller.removed == units.cost


@pytest.mark.parametrize("name", FAMILIES)
def test_all_units_together_are_all_matrices(name: str, setting) -> None:
    one = setting(name)
    assert sum(units.cost * units.count for units in units_of(one)) == one.total


def test_channels_are_really_cut(setting) -> None:
    one = setting("llama")
    channels = [units for units in units_of(one) if not units.heads]
    smaller = without(one, channels, {units.site: torch.arange(0, units.count, 2) for units in channels})
    held = [sum(p.numel() for p in model.parameters()) for model in (one.dense, smaller.model)]
    assert held[0] - held[1] == smaller.removed


def test_every_layer_gives_the_same_share(setting) -> None:
    one = setting("llama")
    for method in (uniform, magnitude, wanda):
        smaller = method(one)(0.4)
        for index in range(2):
            left = sum(p.numel() for p in smaller.model.model.layers[index].mlp.parameters())
            zeros = smaller.model.model.layers[index].self_attn.o_proj.weight.eq(0).all(dim=0).sum()
            assert (left, int(zeros)) == pytest.approx((48 * 96 * 0.62, 16), rel=0.1), method


def test_magnitude_drops_the_channels_with_the_smallest_weights(setting) -> None:
    one = setting("llama")
    smaller = magnitude(one)(0.4).model.model.layers[0].mlp
    dense = one.dense.model.layers[0].mlp
    norms = dense.up_proj.weight.square().sum(1) + dense.gate_proj.weight.square().sum(1)
    norms = norms + dense.down_proj.weight.square().sum(0)
    kept = norms.topk(smaller.up_proj.out_features).indices.sort().values
    assert torch.equal(smaller.up_proj.weight, dense.up_proj.weight[kept])
    assert torch.equal(smaller.down_proj.weight, dense.down_proj.weight[:, kept])


def test_flap_lets_layers_compete_and_adds_biases(setting) -> None:
    one = setting("llama")
    smaller = flap(one)(0.3)
    assert smaller.removed == pytest.approx(0.3 * one.total, rel=0.05)
    assert any(layer.mlp.down_proj.bias is not None for layer in smaller.model.model.layers)
