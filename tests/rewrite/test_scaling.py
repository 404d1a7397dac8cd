"""Producers that scale features are told from others by what passes show, and fitted in recalibration."""

import copy
from typing import Any

import pytest
import torch
from fixtures.families import family
from fixtures.library import build
from fixtures.rebuilt import rebuilt
from torch import nn

from modegpt_graph.compression import prepare
from modegpt_graph.evaluate import kl_divergence
from modegpt_graph.models import forward_logits, resolve
from modegpt_graph.rewrite.recalibrate import Producers, recalibrate
from modegpt_graph.rewrite.scaling import Scaling, find_scalings


def tokens(windows: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 24, (windows, 64), generator=torch.Generator().manual_seed(seed))


def found(model: Any, consumer: str, *producers: str) -> dict[str, Scaling]:
    return find_scalings(model, {consumer: producers}, tokens(1))


def test_an_up_projection_scales_and_a_gate_does_not() -> None:
    mlp = "model.layers.0.mlp"
    up = Scaling(f"{mlp}.up_proj", slice(None))
    model = family("llama")
    assert found(model, f"{mlp}.down_proj", f"{mlp}.gate_proj", f"{mlp}.up_proj") == {f"{mlp}.down_proj": up}
    assert found(model, f"{mlp}.down_proj", f"{mlp}.gate_proj") == {}


def test_values_that_attention_mixes_do_not_scale() -> None:
    attention = "model.decoder.layers.0.self_attn"  # as many values as features
    assert found(family("opt"), f"{attention}.out_proj", f"{attention}.v_proj") == {}


def test_features_of_one_matrix_alone_do_not_scale() -> None:
    layer = "model.decoder.layers.0"
    assert found(family("opt"), f"{layer}.fc2", f"{layer}.fc1") == {}


def test_half_of_a_fused_matrix_scales() -> None:
    model, mlp = build("phi3", "cpu"), "model.layers.0.mlp"
    size = model.get_submodule(f"{mlp}.down_proj").in_features
    expected = Scaling(f"{mlp}.gate_up_proj", slice(size, 2 * size))
    assert found(model, f"{mlp}.down_proj", f"{mlp}.gate_up_proj") == {f"{mlp}.down_proj": expected}


class TakingTurns(nn.Module):
    """An MLP whose gate and up rows take turns in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(8, 12), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.both(nn.functional.one_hot(x % 8, 8).float())
        return self.down(torch.tanh(both[..., 1::2]) * both[..., ::2])


def test_rows_that_take_turns_scale() -> None:
    assert found(TakingTurns(), "down", "both") == {"down": Scaling("both", slice(0, None, 2))}


def test_finding_leaves_the_model_as_it_was() -> None:
    model, mlp = family("llama"), "model.layers.0.mlp"
    before = forward_logits(model, tokens(1))
    found(model, f"{mlp}.down_proj", f"{mlp}.up_proj")
    assert torch.equal(forward_logits(model, tokens(1)), before)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_what_a_producer_lost_is_fitted_there(name: str) -> None:
    dense = family(name) if name == "llama" else build(name, "cpu")
    layers = [f"model.layers.{index}" for index in range(len(dense.model.layers))]
    consumers = [path for path, _ in dense.named_modules() if path.endswith("down_proj")]
    others = [path for path, _ in dense.named_modules() if path.endswith("o_proj")]
    smaller = copy.deepcopy(dense)
    producers = {}
    for path in consumers:
        up = path.replace("down_proj", "gate_up_proj" if name == "phi3" else "up_proj")
        weight = smaller.get_submodule(up).weight
        last = weight.shape[0] - weight.shape[0] // (4 if name == "phi3" else 2)
        weight.data[last:] *= 0.2
        producers[path] = Producers([up], path.rpartition(".")[0])
    plain = copy.deepcopy(smaller)
    may = dict.fromkeys(consumers, True) | dict.fromkeys(others, False)
    recalibrate(dense, plain, layers, may, [tokens()])
    recalibrate(dense, smaller, layers, may, [tokens()], producers=producers)
    other = tokens(seed=1)
    assert kl_divergence(dense, smaller, other) < 0.8 * kl_divergence(dense, plain, other)


def test_solutions_keep_the_rows_of_a_fused_producer() -> None:
    dense = build("phi3", "cpu")
    prepared = prepare(resolve(dense), calibration=tokens(48), evaluating=False)
    result = prepared.at(0.4)
    assert any(one.rows for one in result._solutions.values())
    again = rebuilt(prepared, result)
    torch.testing.assert_close(forward_logits(again, tokens()), forward_logits(result.model, tokens()))


class Direct(nn.Module):
    """Calls another module's forward method, past its hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.forward(x)


def test_producers_whose_module_is_not_seen_called_stay_as_they_are() -> None:
    dense = family("llama")
    for layer in dense.model.layers:
        layer.mlp = Direct(layer.mlp)
    smaller = copy.deepcopy(dense)
    inner = "model.layers.1.mlp.inner"
    smaller.get_submodule(f"{inner}.up_proj").weight.data *= 0.5
    before = smaller.get_submodule(f"{inner}.up_proj").weight.clone()
    layers = [f"model.layers.{index}" for index in range(2)]
    may = {f"{layer}.{end}": True for layer in layers for end in ("mlp.inner.down_proj", "self_attn.o_proj")}
    producers = {f"{inner}.down_proj": Producers([f"{inner}.up_proj"], inner)}
    assert recalibrate(dense, smaller, layers, may, [tokens()], producers=producers).errors == {}
    assert torch.equal(smaller.get_submodule(f"{inner}.up_proj").weight, before)
