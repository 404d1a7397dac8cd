"""The surgeon chooses features where that does clearly less to the logits, and nowhere else."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from modegpt_graph.compression import Prepared, prepare
from modegpt_graph.models import resolve
from modegpt_graph.rewrite import selection
from modegpt_graph.rewrite.presets import PRESETS
from modegpt_graph.rewrite.solve import solver

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
OPT = OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=48)


def model_with_idle_features(config: OPTConfig | LlamaConfig) -> nn.Module:
    """Half of the features are the strongest, and next to nothing reads them: leverage keeps just these."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.1))
    for layer in model.get_decoder().layers:
        reads, writes = (layer.fc1, layer.fc2) if hasattr(layer, "fc1") else (layer.mlp.up_proj, layer.mlp.down_proj)
        reads.weight[::2] *= 30
        writes.weight[:, ::2] *= 1e-3
    return model


def prepared(model: nn.Module) -> Prepared:
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(1))
    return prepare(resolve(model), calibration=tokens, evaluating=False)


@pytest.mark.parametrize("config", [OPT, LLAMA], ids=["plain", "gated"])
def test_the_surgeon_chooses_where_leverage_keeps_what_nothing_reads(config: OPTConfig | LlamaConfig) -> None:
    found = prepared(model_with_idle_features(config))
    (trial,) = found.decomposed.trials
    assert trial.surgeon
    assert (trial.measured, trial.sites) == (3, 3)
    report = found.at(0.3, "uniform").report.outcome
    assert report is not None
    first, fitted, last = report.choices
    assert first == trial.said
    assert fitted.startswith("Recalibration fitted ")
    assert "norm" not in fitted
    assert last.startswith("The logits are scaled by ")
    assert "chosen by the surgeon: at 3 of 3 sites" in trial.said


def test_leverage_stays_where_it_does_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CLEARLY", 0.0)
    decomposed = prepared(model_with_idle_features(OPT)).decomposed
    (trial,) = decomposed.trials
    assert not trial.surgeon
    for one in decomposed.modules:
        for placed in one.placed:
            module, statistics = decomposed.dense.get_submodule(one.path), decomposed.observed.statistics
            own = solver(placed, module, statistics[placed.site.id], PRESETS["default"].recipe)
            assert torch.equal(decomposed.solvers[placed.site.id].errors, own.errors)
