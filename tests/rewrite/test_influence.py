"""A site's influence is the divergence that the rewritten model really has, and ranks follow it."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PhiConfig

import modegpt_graph as mg
from modegpt_graph.allocate.budget import Target
from modegpt_graph.calibrate.observe import calibrate
from modegpt_graph.evaluate import kl_divergence
from modegpt_graph.match.decoder import decoder_layers
from modegpt_graph.match.prepare import read_patterns, survey_model
from modegpt_graph.models import resolve
from modegpt_graph.rewrite.apply import rewrite
from modegpt_graph.rewrite.budget import site_items
from modegpt_graph.rewrite.influence import influences
from modegpt_graph.rewrite.ranks import PROBE_LAYERS, SMOOTH, curve_ranks, interpolated, probed, roughness
from modegpt_graph.rewrite.solve import Recipe, solver

CONFIGS = {
    "grouped heads, rotary": LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "learned positions, biases": OPTConfig(
        vocab_size=50,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "partial rotary, biases": PhiConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        partial_rotary_factor=0.5,
    ),
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.8 if parameter.ndim > 1 else 0.1))
    return model.double()


class Sharing(nn.Module):
    """A layer that reads what the layer before it put into a dict."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor, shared: dict[int, Tensor]) -> Tensor:
        shared[self.number] = self.down(self.up(x).relu())
        return x + shared[self.number] + (shared[self.number - 1] if self.number else 0)


class SharingDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        self.layers = nn.ModuleList(map(Sharing, range(3)))

    def forward(self, ids: Tensor) -> Tensor:
        x, shared = self.embedding(ids), {}
        for layer in self.layers:
            x = layer(x, shared)
        return self.head(x)


def test_layers_that_share_more_than_their_outputs_are_all_run() -> None:
    torch.manual_seed(0)
    model, tokens = SharingDecoder().eval().requires_grad_(False), torch.randint(0, 50, (3, 20))
    result = mg.compress(model, 0.25, calibration=tokens, example_inputs=(tokens,))
    assert result.report.outcome.ratios.decoder_linear == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scale", ["none", "complex"])
def test_influence_equals_the_divergence_of_the_rewritten_model(name: str, scale: str) -> None:
    model = _model(name)
    tokens = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    surveyed = survey_model(resolve(model), read_patterns())
    modules, layers = surveyed.modules(), decoder_layers(surveyed.trace)
    observed = calibrate(model, modules, layers, tokens)
    items = {item.id: item for item in site_items(modules)}
    solutions = {}
    for one in modules:
        for placed in one.placed:
            site = placed.site.id
            known = solver(placed, model.get_submodule(one.path), observed.statistics[site], Recipe(scale=scale))
            solutions[site] = known.solution(items[site].nearest(items[site].full_rank / 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = influences(model, modules, layers, solutions, tokens)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(found) == set(solutions)
    for site, solution in solutions.items():
        changed = copy.deepcopy(model)
        rewrite(changed, modules, {site: solution})
        # kl_divergence leaves out the last position of each window, which `influences` counts.
        padded = torch.cat([tokens, tokens[:, -1:]], dim=1)
        expected = kl_divergence(model, changed, padded)
        assert found[site] == pytest.approx(expected, rel=1e-2, abs=1e-7), site  # both in float32


def test_influence_leaves_a_forward_that_was_set_on_an_instance() -> None:
    model = _model("grouped heads, rotary")
    tokens = torch.randint(0, 50, (1, 8), generator=torch.Generator().manual_seed(0))
    surveyed = survey_model(resolve(model), read_patterns())
    modules, layers = surveyed.modules(), decoder_layers(surveyed.trace)
    first = model.get_submodule(layers[0])
    first.forward = own = first.forward  # as accelerate's hooks do
    observed = calibrate(model, modules, layers, tokens)
    last = [(one, placed) for one in modules for placed in one.placed if placed.site.layer == 1][-1]
    module = model.get_submodule(last[0].path)
    known = solver(last[1], module, observed.statistics[last[1].site.id], Recipe())
    influences(model, modules, layers, {last[1].site.id: known.solution(8)}, tokens)
    assert first.forward is own


def test_few_layers_are_measured_in_a_deep_model_and_the_others_interpolated() -> None:
    assert probed([3, 7, 5]) == [3, 5, 7]
    chosen = probed(range(80))
    assert len(chosen) == PROBE_LAYERS
    assert chosen[:2] + chosen[-2:] == [0, 1, 78, 79]
    assert max(b - a for a, b in itertools.pairwise(chosen)) <= 8
    straight = {layer: 3.0 * 1.1**layer for layer in range(0, 20, 2)}
    assert roughness(straight) == pytest.approx(0.0, abs=1e-9)
    assert roughness(straight | {8: 2 * straight[8]}) > SMOOTH
    known = {0: 1.0, 4: 16.0, 8: 4.0}
    assert [interpolated(known, layer) for layer in (0, 1, 2, 4, 6)] == pytest.approx([1.0, 2.0, 4.0, 16.0, 8.0])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_a_site_that_costs_more_keeps_more(weights: tuple[float, float]) -> None:
    model = _model("grouped heads, rotary")
    surveyed = survey_model(resolve(model), read_patterns())
    modules = surveyed.modules()
    items = [item for item in site_items(modules) if item.id.endswith("mlp")]

    class Straight:
        def __init__(self, size: int) -> None:
            self.errors = (1 - torch.arange(size + 1) / size).double().square()

    solvers = {item.id: Straight(item.full_rank) for item in items}
    costs = [cost / weight for cost, weight in zip((4.0, 1.0), weights, strict=True)]
    measured = {item.id: {item.full_rank // 2: cost} for item, cost in zip(items, costs, strict=True)}
    counted = {item.id: weight for item, weight in zip(items, weights, strict=True)}
    total = sum(item.removed(0) for item in items)
    ranks = curve_ranks(
        items, solvers, counted, measured, lambda doubtful: pytest.fail(f"{doubtful} are told"), Target(total, 0.4)
    )
    lost = [1 - ranks[item.id] / item.full_rank for item in items]
    # The optimum of Σ w·x² under Σ x = const has w·x equal everywhere.
    assert lost[1] == pytest.approx(4 * lost[0], abs=2 / items[0].full_rank * 4)
