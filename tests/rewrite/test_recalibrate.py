"""Consumers are fitted again to what the smaller model really computes, and only where the stream is known."""

import copy
from typing import Any

import pytest
import torch
from fixtures.families import family
from fixtures.library import build
from fixtures.rebuilt import rebuilt
from torch import nn

import modegpt_graph as mg
from modegpt_graph.calibrate.stream import stream_entries
from modegpt_graph.compression import prepare
from modegpt_graph.evaluate import kl_divergence
from modegpt_graph.models import forward_logits, resolve
from modegpt_graph.rewrite.lockstep import SteppedPass, current_pass
from modegpt_graph.rewrite.recalibrate import recalibrate

WINDOWS, WINDOW = 16, 64


def tokens(seed: int = 0) -> torch.Tensor:
    # Few different tokens in a fixed order of succession: something that a fit can learn and keep.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 24, (WINDOWS, WINDOW), generator=generator)


def paths(model: Any, *ends: str) -> dict[str, bool]:
    return {path: True for path, _ in model.named_modules() if path.endswith(ends)}


def layers(model: Any) -> list[str]:
    return [f"model.layers.{index}" for index in range(len(model.model.layers))]


def normed() -> Any:
    """A model with norms after its consumers, which put out much more than a norm adds under its root."""
    model = build("gemma2", "cpu")
    for path in paths(model, "o_proj", "down_proj"):
        model.get_submodule(path).weight.data *= 1e4
    return model


def test_a_pass_stops_where_a_hook_says_and_raises_what_it_raises() -> None:
    seen = []

    def work() -> None:
        for number in range(3):
            own = current_pass()
            assert own is not None
            own.stop(number)
            seen.append(number)
        raise ValueError("the end")

    one = SteppedPass(work)
    assert [one.advance() for _ in range(3)] == [0, 1, 2]
    assert seen == [0, 1]
    with pytest.raises(ValueError, match="the end"):
        one.advance()
    assert one.advance() is None
    other = SteppedPass(work)
    other.advance()
    other.abandon()
    assert not other.is_alive()
    assert seen == [0, 1, 2]


def test_entries_have_the_constants_by_which_consumers_enter_the_stream() -> None:
    model = build("granite", "cpu")
    multiplier = model.config.residual_multiplier
    found = stream_entries(model, layers(model), paths(model, "o_proj", "down_proj"), tokens()[:1])
    assert len(found) == 2 * len(layers(model))
    assert [one.constant for one in found.values()] == pytest.approx([multiplier] * len(found), rel=1e-4)
    assert all(one.follower is None for one in found.values())


def test_a_norm_after_a_consumer_is_found_with_its_gains() -> None:
    model = build("gemma2", "cpu")
    found = stream_entries(model, layers(model), paths(model, "o_proj", "down_proj"), tokens()[:1])
    assert [one.constant for one in found.values()] == pytest.approx([1.0] * 2 * len(layers(model)), rel=1e-4)
    for one in found.values():
        assert one.follower is not None
        assert one.gains is not None
        expected = 1 + model.get_submodule(one.follower).weight.double()
        torch.testing.assert_close(one.gains / one.gains.norm(), expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_a_norm_takes_the_length_of_what_it_is_given() -> None:
    model = normed()
    consumers = paths(model, "o_proj", "down_proj")
    found = stream_entries(model, layers(model), consumers, tokens()[:1])
    assert len(found) == len(consumers)
    assert all(one.is_normed and one.parameter == "weight" for one in found.values())


def test_the_gains_of_a_norm_that_does_more_than_follow_one_consumer_are_not_to_be_fitted() -> None:
    shared, tied = normed(), normed()
    for layer in shared.model.layers:
        layer.post_feedforward_layernorm = layer.post_attention_layernorm
    for layer in tied.model.layers:
        layer.post_feedforward_layernorm.weight = layer.post_attention_layernorm.weight
    for model in shared, tied:
        found = stream_entries(model, layers(model), paths(model, "o_proj", "down_proj"), tokens()[:1])
        assert [(one.is_normed, one.parameter) for one in found.values()] == [(True, None)] * 2 * len(layers(model))


def test_the_length_that_a_norm_gives_is_fitted() -> None:
    dense = normed()
    smaller = copy.deepcopy(dense)
    norm, consumer = "model.layers.1.post_feedforward_layernorm", "model.layers.1.mlp.down_proj"
    wrong = smaller.get_submodule(norm).weight
    wrong.data = 0.5 * (1 + wrong) - 1
    before = kl_divergence(dense, smaller, tokens(1))
    only = {path: path == consumer for path in paths(dense, "o_proj", "down_proj")}
    given = copy.deepcopy(smaller)
    found = recalibrate(dense, smaller, layers(dense), only, [tokens()])
    assert kl_divergence(dense, smaller, tokens(1)) < 0.2 * before
    weights = dict(given.named_parameters())
    changed = {path for path, own in smaller.named_parameters() if not torch.equal(own, weights[path])}
    assert f"{norm}.weight" in changed
    assert (found.norms, consumer in found.consumers) == (1, f"{consumer}.weight" in changed)


class NormedLayer(nn.Module):
    def __init__(self, gains: torch.Tensor) -> None:
        super().__init__()
        self.consumer = nn.Linear(len(gains), len(gains), bias=False)
        self.norm = nn.RMSNorm(len(gains))
        nn.init.eye_(self.consumer.weight)
        self.norm.weight.data = gains

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return stream + self.norm(self.consumer(stream))


def test_a_norm_of_unlike_gains_is_found_where_one_token_is_huge() -> None:
    torch.manual_seed(69)
    gains, table = torch.exp(4 * torch.randn(32)), torch.randn(64, 32)
    table[:, 3] *= 0.1
    table[0] *= 0.1
    table[0, 3] = 100
    model = nn.Sequential(nn.Embedding.from_pretrained(table), NormedLayer(gains)).requires_grad_(False)
    found = stream_entries(model, ["1"], ["1.consumer"], torch.arange(64)[None])
    assert [one.is_normed for one in found.values()] == [True]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 32), requires_grad=False)

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        return self.weight * output


def test_a_follower_that_scales_columns_alone_is_no_norm_and_makes_up_for_what_is_lost() -> None:
    dense = build("gemma2", "cpu")
    for layer in dense.model.layers:
        layer.post_attention_layernorm, layer.post_feedforward_layernorm = Scaled(), Scaled()
    consumers = paths(dense, "o_proj", "down_proj")
    found = stream_entries(dense, layers(dense), consumers, tokens()[:1])
    assert [one.is_normed for one in found.values()] == [False] * len(consumers)
    broken = "model.layers.0.self_attn.o_proj"
    smaller = copy.deepcopy(dense)
    nn.init.zeros_(smaller.get_submodule(broken).weight)
    before = kl_divergence(dense, smaller, tokens(1))
    recalibrate(dense, smaller, layers(dense), consumers | {broken: False}, [tokens()])
    assert kl_divergence(dense, smaller, tokens(1)) < 0.7 * before


def test_a_follower_that_does_more_than_scale_has_no_entry() -> None:
    model = build("gemma2", "cpu")
    for layer in model.model.layers:
        layer.post_feedforward_layernorm = nn.Sequential(nn.LayerNorm(32), nn.Tanh())
    assert stream_entries(model, layers(model), paths(model, "o_proj", "down_proj"), tokens()[:1]) == {}


def test_a_layer_whose_change_has_another_part_has_no_entry() -> None:
    model = family("llama")
    assert stream_entries(model, layers(model), paths(model, "down_proj"), tokens()[:1]) == {}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_what_a_wrong_matrix_lost_is_fitted_by_the_next_ones(name: str) -> None:
    dense = family(name) if name == "llama" else build(name, "cpu")
    consumers = paths(dense, "o_proj", "down_proj")
    smaller = copy.deepcopy(dense)
    broken = next(iter(consumers))
    nn.init.zeros_(smaller.get_submodule(broken).weight)
    others = {path: path != broken for path in consumers}
    entries = stream_entries(dense, layers(dense), consumers, tokens()[:1])
    norms = {f"{one.follower}.{one.parameter}" for path, one in entries.items() if one.parameter and others[path]}
    unchanged = {name: value.clone() for name, value in smaller.state_dict().items()}
    before = kl_divergence(dense, smaller, tokens(1))
    recalibrate(dense, smaller, layers(dense), others, [tokens()])
    assert kl_divergence(dense, smaller, tokens(1)) < 0.7 * before
    changed = {name for name, value in smaller.state_dict().items() if not torch.equal(value, unchanged[name])}
    assert changed == norms | {"model.norm.weight"} | {f"{path}.weight" for path, may in others.items() if may}


def test_a_model_that_lost_nothing_stays_as_it_is() -> None:
    dense = family("llama")
    smaller = copy.deepcopy(dense)
    recalibrate(dense, smaller, layers(dense), paths(dense, "o_proj", "down_proj"), [tokens()])
    torch.testing.assert_close(smaller.state_dict(), dense.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama with biases", "opt", "phi", "gpt-neox"])
def test_errors_after_recalibration_are_those_of_the_new_matrices(name: str) -> None:
    dense = family(name)
    prepared = prepare(resolve(dense), calibration=tokens(48), evaluating=False)
    before = prepared.decomposed.solutions(prepared.decomposed.ranks(0.4))
    result = prepared.at(0.4)
    after = {site.id: site.relative_error for site in result.report.outcome.sites}  # type: ignore[union-attr]
    again = rebuilt(prepared, result)
    torch.testing.assert_close(forward_logits(again, tokens()), forward_logits(result.model, tokens()))
    moved = [site for site, one in before.items() if after[site] != one.relative_error]
    assert moved


def test_errors_on_a_long_text_are_measured_on_passes_from_all_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (WINDOWS * WINDOW, WINDOWS * WINDOW // 2):
        monkeypatch.setattr("modegpt_graph.rewrite.recalibrate.ERROR_TOKENS", most)
        result = mg.compress(family("llama"), 0.5, calibration=tokens(), evaluate=False, allocator="uniform")
        sites = result.report.outcome.sites  # type: ignore[union-attr]
        found.append(torch.tensor([site.relative_error for site in sites if ".mlp" in site.id]))
    assert bool((found[0] != found[1]).all())
    torch.testing.assert_close(*found, rtol=0.1, atol=0.0)


def test_recalibration_is_closer_to_the_dense_model_on_other_text() -> None:
    dense = family("llama")
    closer = mg.compress(dense, 0.5, calibration=tokens(), evaluate=False, allocator="uniform")
    plain = mg.compress(dense, 0.5, calibration=tokens(), evaluate=False, allocator="uniform", recalibrate=False)
    assert kl_divergence(dense, closer.model, tokens(1)) < kl_divergence(dense, plain.model, tokens(1))
