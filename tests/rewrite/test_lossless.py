"""A rewrite that keeps every feature, in shuffled order, changes nothing; and what proves it can tell when one does."""

import copy
from typing import Any

import pytest
import torch
from fixtures import library
from fixtures.families import family, shrunk, tokens
from torch import Tensor, nn

import modegpt_graph as mg
from modegpt_graph.rewrite.apply import rewrite
from modegpt_graph.rewrite.solution import Solution, shuffled

TOLERANCE = 1e-4  # of the largest logit, float32: sums in another order move it by about 1e-6


@pytest.mark.parametrize("name", ["llama", "opt", "gemma", "phi", "gpt-neox", "gpt2"])
def test_a_shuffled_rewrite_changes_nothing(name: str) -> None:
    proof = mg.verify(family(name))
    assert proof.sites == 6  # query/key, value/output and MLP in each of two layers
    assert proof.max_relative_error < TOLERANCE
    assert proof.generation_identical


def test_attention_that_is_written_out_gets_the_mask_that_it_was_traced_with() -> None:
    """Of a model that attends without the library's interface, whose masks differ by the way in which it attends."""
    model: Any = library.build("falcon-old", device="cpu")
    model.config._attn_implementation = "sdpa"
    proof = mg.verify(model)
    assert proof.max_relative_error < TOLERANCE
    assert proof.generation_identical
    assert model.config._attn_implementation == "sdpa"  # the model given is left as it was


def test_nor_in_the_demo_model(demo: nn.Module) -> None:
    proof = mg.verify(demo)
    assert proof.sites == 90
    assert proof.max_relative_error < TOLERANCE
    assert proof.generation_identical


def rewritten(name: str) -> tuple[Any, Any]:
    """The dense model in float64, and its shuffled rewrite."""
    one = shrunk(name)
    generator = torch.Generator().manual_seed(0)
    solutions = {p.site.id: shuffled(p.footprint.layout, generator) for module in one.modules for p in module.placed}
    changed = copy.deepcopy(one.dense)
    rewrite(changed, one.modules, solutions)
    return one.dense, changed


def difference(first: Any, second: Any) -> float:
    ids = tokens(2, 12, seed=5)
    with torch.no_grad():
        expected, found = (model(ids, use_cache=False).logits for model in (first, second))
    return float((found - expected).abs().max() / expected.abs().max())


def index_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if ".index_" in name}


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_a_wrong_order_of_the_rotary_tables_is_seen(name: str) -> None:
    dense, changed = rewritten(name)
    assert difference(dense, changed) < 1e-12
    buffers = index_buffers(changed)
    assert buffers
    for buffer in buffers.values():
        buffer.copy_(buffer.roll(1, -1))
    assert difference(dense, changed) > 100 * TOLERANCE


@pytest.mark.parametrize("role", ["query", "key", "value", "output", "gate", "up", "down"])
def test_a_wrong_order_in_one_matrix_is_seen(role: str) -> None:
    dense, changed = rewritten("llama")
    site = next(site for site in shrunk("llama").result.report.sites if role in site.roles)
    weight = changed.get_parameter(site.roles[role].parameter)
    weight.copy_(weight.roll(1, 1 if role in ("down", "output") else 0))
    assert difference(dense, changed) > 100 * TOLERANCE


def test_verify_fails_where_the_rewrite_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `verify`, given solutions that forget what goes with the features."""
    from modegpt_graph.evaluate import proof as room

    def forgetful(layout: Any, generator: torch.Generator) -> Solution:
        honest = shuffled(layout, generator)
        identity = torch.eye(layout.size, dtype=torch.float64).expand(layout.groups, 1, -1, -1)
        return Solution(honest.kept, {next(iter(layout.members)): identity})

    monkeypatch.setattr(room, "shuffled", forgetful)
    proof = mg.verify(family("llama"))
    assert proof.max_relative_error > 100 * TOLERANCE
    assert not proof.generation_identical
