"""What a model hands its modules, and what it cannot be seen to hand them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

import modegpt_graph as mg
from modegpt_graph.match.prepare import read_patterns, survey_model
from modegpt_graph.models import resolve

VOCABULARY, WIDTH = 40, 16


class Scaled(nn.Module):
    """A fused gated MLP: other sizes need another forward method, with the constant in it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(WIDTH, 48, bias=False)
        self.down = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        gate, up = self.gate_up(x).split(24, dim=-1)
        return self.down(functional.silu(gate) * up) * scale


class Twice(nn.Module):
    """Every layer runs its MLP twice, the second time with `second` as its constant."""

    def __init__(self, second: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Scaled() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.second = second

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x, 0.5)
            x = x + layer(x, self.second)
        return self.head(x)


@pytest.mark.parametrize(("second", "conditions"), [(0.5, []), (0.25, ["scale == 0.25"])])
def test_each_way_in_which_a_module_is_called_is_written_anew(second: float, conditions: list[str]) -> None:
    torch.manual_seed(0)
    model, inputs = Twice(second).eval(), (torch.randint(VOCABULARY, (2, 9)),)
    modules = survey_model(resolve(model, example_inputs=inputs), read_patterns()).modules()
    assert [[condition for condition, _ in one.forks] for one in modules] == [conditions, conditions]
    proof = mg.verify(model, example_inputs=inputs)
    assert (proof.sites, proof.max_relative_error < 1e-5) == (2, True)


def library_model(kind: str, **figures: object) -> nn.Module:
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, **figures)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_the_part_of_a_cache_that_a_module_updates_is_followed() -> None:
    model = library_model("megatron-bert", num_hidden_layers=1, num_attention_heads=2, is_decoder=True)
    proof = mg.verify(model)
    assert proof.sites == 3
    assert proof.max_relative_error < 1e-5
    assert proof.generation_identical


def test_a_model_that_only_hands_on_whether_to_keep_a_cache_is_run_with_one() -> None:
    figures = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = library_model("granitemoe", **figures)
    modules = survey_model(resolve(model), read_patterns()).modules()
    (call,) = [one.trace.call for one in modules if one.path == "model.layers.0.self_attn"]
    assert call.has_cache
    assert call.length is not None
    assert call.cache_layers == (0,)


class Listing(Scaled):
    def forward(self, x: Tensor, scale: float = 1.0) -> list[Tensor]:  # type: ignore[override]
        return [super().forward(x, scale)]


class Extending(nn.Module):
    """Its layers return lists, which it adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Listing() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            parts = layer(x)
            parts.append(x)
            x = torch.stack(parts).sum(0)
        return self.head(x)


def test_a_list_that_a_module_returns_stays_one() -> None:
    torch.manual_seed(0)
    model, inputs = Extending().eval(), (torch.randint(VOCABULARY, (2, 9)),)
    result = mg.compress(model, 0.25, calibration=inputs[0].repeat(4, 1), example_inputs=inputs)
    assert isinstance(result.model.layers[0](torch.randn(1, 3, WIDTH)), list)
    assert torch.isfinite(result.model(*inputs)).all()
