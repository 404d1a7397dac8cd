"""Mixtures of experts, the whole way: lossless when shuffled, stated errors are measured ones, loaded as saved."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import experts as by_hand
from fixtures import latent
from fixtures.families import tokens
from fixtures.library import build
from torch import Tensor

import modegpt_graph as mg
from modegpt_graph.rewrite.apply import rewrite

LOSSLESS = 1e-5  # of the largest logit, float32: sums in another order move it by about 1e-6
ROUNDED = 1e-3  # of an error: sums over tens of tokens in float32
STRONGER = 4.0  # random projections of tiny models barely tell tokens apart
LIBRARY = ("mixtral", "gpt-oss", "deepseek-v3")


@cache
def library_model(name: str) -> Any:
    model: Any = build(name, "cpu")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(STRONGER)
    model.generation_config.pad_token_id = 0
    return model


@cache
def compressed(name: str) -> mg.Result:
    return mg.compress(library_model(name), 0.25, calibration=tokens(), allocator="uniform", evaluate=False)


RATIOS = {"split": 0.29}  # grouped products keep whole eights of features: not every ratio can be met


@cache
def compressed_by_hand(form: str) -> tuple[by_hand.Decoder, mg.Result, Tensor]:
    model, inputs = by_hand.decoder(form)
    ids = torch.randint(by_hand.VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(1))
    return model, mg.compress(model, RATIOS.get(form, 0.3), calibration=ids, example_inputs=inputs, evaluate=False), ids


def expert_sites(result: mg.Result) -> list[dict[str, Any]]:
    return [
        site for site in result.report.to_json()["sites"] if ".experts." in site["id"] and "shared" not in site["id"]
    ]


@pytest.mark.parametrize("name", LIBRARY)
def test_a_shuffled_rewrite_changes_nothing(name: str) -> None:
    proof = mg.verify(library_model(name))
    assert proof.max_relative_error < LOSSLESS
    assert proof.generation_identical
    assert proof.sites == len([s for s in compressed(name).report.sites if s.decomposition is not None])


@pytest.mark.parametrize("form", ["plain", "biased", "split", *by_hand.EACH])
def test_nor_in_decoders_written_by_hand(form: str) -> None:
    model, inputs = by_hand.decoder(form)
    proof = mg.verify(model, example_inputs=inputs)
    assert proof.sites == by_hand.LAYERS * by_hand.EXPERTS
    assert proof.max_relative_error < LOSSLESS


@pytest.mark.parametrize("first", [False, True])
def test_nor_in_latent_attention(first: bool) -> None:
    model, inputs = latent.decoder(first)
    proof = mg.verify(model, example_inputs=inputs)
    assert proof.sites == latent.LAYERS * 3
    assert proof.max_relative_error < LOSSLESS


@pytest.mark.parametrize("name", LIBRARY)
def test_all_experts_of_a_tensor_keep_equally_many_features_of_their_own(name: str) -> None:
    result, dense = compressed(name), library_model(name)
    for site in {placed.site.id: placed for one in result._surveyed.modules() for placed in one.placed}.values():
        if site.site.copies > 1:
            (kept,) = result._solutions[site.site.id].kept
            assert kept.shape[0] == 4
            assert kept.shape[1] % 8 == 0
            assert len({tuple(sorted(row.tolist())) for row in kept}) > 1
    before, after = dense.state_dict(), result.model.state_dict()
    routers = [key for key in before if key.endswith(("mlp.gate.weight", "mlp.router.weight"))]
    assert routers
    assert all(torch.equal(before[key], after[key]) for key in routers)
    assert (
        sum(p.numel() for p in result.model.parameters())
        == result.report.to_json()["compression"]["parameters"]["after"]
    )


def outputs_by_expert(model: Any, layer: int, ids: Tensor) -> list[Tensor]:
    """Per expert, (tokens, D) what it says of the tokens that are routed to it, the router's weights left out."""
    module, seen = model.model.layers[layer].mlp.experts, []
    handle = module.register_forward_hook(lambda _, args, kwargs, out: seen.append((args, kwargs)), with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    ((args, kwargs),) = seen
    hidden, chosen, _ = [*args, *kwargs.values()]
    ones = torch.ones(len(hidden), 1)
    return [
        module(hidden, torch.full((len(hidden), 1), expert), ones)[(chosen == expert).any(-1)]
        for expert in range(module.num_experts)
    ]


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_the_error_stated_of_each_expert_is_the_measured_one(name: str) -> None:
    result, dense = compressed(name), library_model(name)
    stated = {site["id"]: site for site in expert_sites(result)}
    for one in result._surveyed.modules():
        for placed in one.placed:
            if placed.site.copies == 1:
                continue
            changed = copy.deepcopy(dense)
            rewrite(changed, result._surveyed.modules(), {placed.site.id: result._solutions[placed.site.id]})
            assert placed.site.layer is not None
            pairs = zip(
                placed.site.apart(),
                outputs_by_expert(dense, placed.site.layer, tokens()),
                outputs_by_expert(changed, placed.site.layer, tokens()),
                strict=True,
            )
            for site, expected, found in pairs:
                error = float((found - expected).square().sum() / expected.square().sum())
                assert stated[site.id]["tokens"] == len(expected)
                assert stated[site.id]["relative_error"] > 1e-6
                assert error == pytest.approx(stated[site.id]["relative_error"], rel=ROUNDED), site.id


@pytest.mark.parametrize("name", LIBRARY)
def test_saved_and_loaded_models_generate_alike(name: str, tmp_path: Path) -> None:
    result = compressed(name)
    result.save(tmp_path / "out")
    loaded: Any = mg.load(tmp_path / "out")
    small: Any = result.model
    ids = tokens(2, 9, seed=3)
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    with torch.no_grad():
        assert torch.equal(small.generate(ids, **how), loaded.generate(ids, **how))
        before, after = small(ids).logits, loaded(ids).logits
    assert float((before - after).abs().max()) < LOSSLESS * float(before.abs().max())


@pytest.mark.parametrize("form", ["plain", "biased", "split", *by_hand.EACH])
def test_so_do_decoders_written_by_hand(form: str, tmp_path: Path) -> None:
    _, result, ids = compressed_by_hand(form)
    result.save(tmp_path / "out")
    loaded = mg.load(tmp_path / "out", factory=lambda: by_hand.decoder(form))
    assert torch.equal(loaded(ids), result.model(ids))
    reached = result.report.to_json()["compression"]["ratios"]["decoder_linear"]
    assert reached == pytest.approx(RATIOS.get(form, 0.3), abs=0.006)


def test_an_expert_that_no_token_reaches_keeps_its_largest_weights_as_they_are() -> None:
    model = copy.deepcopy(library_model("mixtral"))
    weight = model.model.layers[0].mlp.gate.weight
    # The last expert is the first one's shadow: always a little less likely, and behind it two more of the same.
    weight[1:] = weight[0] * torch.tensor([[1.0], [1.0], [1.0]])
    with torch.no_grad():
        logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
        handle = model.model.layers[0].mlp.gate.register_forward_hook(
            lambda module, args, output: (
                output[0],
                output[1],
                logits.argsort(descending=True)[:2].expand_as(output[2]),
            )
        )
        result = mg.compress(model, 0.25, calibration=tokens(), allocator="uniform", evaluate=False)
        handle.remove()
    sites = [site for site in expert_sites(result) if site["layer"] == 0]
    assert [site["tokens"] for site in sites] == [96, 96, 0, 0]
    assert [site["relative_error"] is None for site in sites] == [False, False, True, True]
    small: Any = result.model
    before, after = (one.model.layers[0].mlp.experts.down_proj for one in (model, small))
    strongest = before[3].norm(dim=0).argsort(descending=True)[: after.shape[-1]].sort().values
    assert torch.allclose(after[3], before[3][:, strongest])
