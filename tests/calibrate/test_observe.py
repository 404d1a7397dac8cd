"""One pass over the text: what each site is seen to do is what it does, and the model is put back as it was."""

import copy
from typing import Any

import pytest
import torch
from fixtures.families import Shrunk, family, shrunk, tokens
from torch import Tensor, nn

from modegpt_graph.calibrate import observe
from modegpt_graph.calibrate.observe import Calibrated, calibrate
from modegpt_graph.calibrate.statistics import ConsumerStatistics, OverflowedActivations, ScoreStatistics
from modegpt_graph.match.decoder import decoder_layers


def run(one: Shrunk, model: Any = None, ids: Tensor | None = None) -> Calibrated:
    layers = decoder_layers(one.result._surveyed.trace)
    return calibrate(model or one.dense, one.modules, layers, one.tokens if ids is None else ids)


def inputs_of(model: nn.Module, path: str, ids: Tensor) -> Tensor:
    """(T, N) what a module of the dense model reads."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("batch", [4096, 32])
def test_what_a_consumer_reads_is_summed_over_all_batches(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "TOKENS_PER_BATCH", batch)
    one = shrunk(name)
    found = run(one)
    assert found.tokens == one.tokens.numel()
    checked = 0
    for site in one.result.report.sites:
        statistics = found.statistics[site.id]
        if isinstance(statistics, ScoreStatistics):
            continue
        assert isinstance(statistics, ConsumerStatistics)
        role = site.roles.get("down") or site.roles["output"]
        rows = inputs_of(one.dense, role.parameter.rpartition(".")[0], one.tokens)
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
        assert torch.allclose(statistics.gram, rows.T @ rows, rtol=1e-10, atol=1e-10), site.id
        checked += 1
    assert checked == 4


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_block_influence_is_one_minus_the_mean_cosine(name: str) -> None:
    """The library's own hidden states, in float32 as the measure is taken: the last one is after the final norm."""
    one = shrunk(name)
    with torch.no_grad():
        states = one.dense(one.tokens, output_hidden_states=True).hidden_states
    expected = 1 - torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean()
    found = run(one).importance
    assert found.shape == (2,)
    assert float(found[0]) == pytest.approx(float(expected), rel=1e-5)
    layers = decoder_layers(one.result._surveyed.trace)
    seen: list[Tensor] = []
    handle = one.dense.get_submodule(layers[1]).register_forward_hook(
        lambda _, inputs, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        one.dense(one.tokens)
    handle.remove()
    last = 1 - torch.nn.functional.cosine_similarity(states[1], seen[0], dim=-1).mean()
    assert float(found[1]) == pytest.approx(float(last), rel=1e-5)


def test_nothing_after_the_last_layer_is_computed() -> None:
    one = shrunk("llama")

    def refuse(*_: object) -> None:
        raise AssertionError("the logits were computed")

    handle = one.dense.lm_head.register_forward_pre_hook(refuse)
    run(one)
    handle.remove()


def portrait(model: nn.Module) -> dict[str, Any]:
    """All that a module consists of, by the identity of what cannot be compared."""
    return {
        path: (
            type(part),
            {name: id(value) for name, value in vars(part).items() if not name.startswith("_")},
            {name: id(value) for name, value in part._parameters.items()},
            {name: id(value) for name, value in part._buffers.items()},
            {name: len(value) for name, value in vars(part).items() if name.endswith("_hooks")},
        )
        for path, part in model.named_modules()
    }


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    one = shrunk(name)
    before, weights = portrait(one.dense), {key: value.clone() for key, value in one.dense.state_dict().items()}
    run(one)
    assert portrait(one.dense) == before
    assert all(torch.equal(value, weights[key]) for key, value in one.dense.state_dict().items())


def test_so_it_is_where_the_pass_stops_in_the_middle() -> None:
    one = shrunk("llama")
    before = portrait(one.dense)
    with pytest.raises(IndexError):
        run(one, ids=torch.full((2, 8), 10_000))
    assert portrait(one.dense) == before


def test_a_rewritten_model_keeps_its_own_attributes() -> None:
    """Its forward methods read sizes and indices by the names that an observed forward method would give its own."""
    import modegpt_graph as mg

    smaller = copy.deepcopy(shrunk("llama").result.model)
    before, ids = portrait(smaller), tokens(2, 8, seed=9)
    expected = smaller(ids).logits
    again = mg.compress(smaller, 0.1, calibration=tokens(), evaluate=False)
    assert portrait(smaller) == before
    assert torch.equal(smaller(ids).logits, expected)
    again.model(ids)


def test_a_model_that_overflows_is_refused() -> None:
    one, broken = shrunk("llama"), family("llama")
    broken.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    before = portrait(broken)
    with pytest.raises(OverflowedActivations, match=r"model\.layers\.1\.mlp:gated-mlp: the Gram matrix has"):
        run(one, broken)
    assert portrait(broken) == before
