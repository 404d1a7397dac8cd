"""Dropped layers pass the stream on; scores are those of the papers, computed here from the layers' own values."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from fixtures.families import family
from torch import Tensor

from modegpt_graph.evaluate import perplexity
from modegpt_graph.methods.layers import losses_without, pass_by, shortgpt, sleb


def stream_of(model: Any, tokens: Tensor) -> list[Tensor]:
    """The stream before every layer and after the last, by the library's own record of it (before the last norm)."""
    layers, seen = model.model.layers, []
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda _, args, output: seen.append(output)))
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_shortgpt_scores_are_one_minus_cosine(setting) -> None:
    one = setting("llama")
    seen = stream_of(one.dense, one.tokens)
    for layer, (before, after) in enumerate(pairwise(seen)):
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert float(one.observed.importance[layer]) == pytest.approx(1 - float(cosine.mean()), rel=1e-4)


def test_shortgpt_drops_the_layer_with_the_least_score(setting) -> None:
    one = setting("llama")
    smaller = shortgpt(one)(0.5)
    assert smaller.removed == one.total // 2
    stays = int(one.observed.importance.argmax())
    expected = copy.deepcopy(one.dense)
    expected.model.layers = torch.nn.ModuleList([expected.model.layers[stays]])
    with torch.no_grad():
        torch.testing.assert_close(
            smaller.model(one.tokens, use_cache=False).logits, expected(one.tokens, use_cache=False).logits
        )


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi", "gpt-neox"])
def test_an_empty_layer_changes_nothing_in_the_stream(name: str, setting) -> None:
    """The last layer passed by: what is left is the model of one layer less that runs on."""
    one = setting(name)
    smaller = shortgpt(one)(0.5)
    logits = smaller.model(one.tokens[:1]).logits
    assert logits.shape == one.dense(one.tokens[:1]).logits.shape
    assert torch.isfinite(logits).all()


def test_sleb_loss_is_that_of_the_model_without_the_layer(setting) -> None:
    """Starting at the layer gives what running everything gives."""
    one = setting("llama")
    losses = losses_without(copy.deepcopy(one.dense), one.layers, one.tokens)
    for path, loss in zip(one.layers, losses, strict=True):
        trial = copy.deepcopy(one.dense)
        pass_by(trial.get_submodule(path), None)
        assert loss == pytest.approx(math.log(perplexity(trial, one.tokens)), rel=1e-5)


def test_sleb_drops_the_layer_that_is_least_missed(setting) -> None:
    one = setting("llama")
    losses = losses_without(copy.deepcopy(one.dense), one.layers, one.tokens[[0, 2, 5, 7]])
    smaller = sleb(one)(0.5)
    dropped = [not list(smaller.model.get_submodule(path).children()) for path in one.layers]
    assert dropped == [loss == min(losses) for loss in losses]


def test_trying_layers_leaves_the_model_as_it_was() -> None:
    model = family("llama")
    tokens = torch.arange(40).view(2, 20)
    before = model(tokens).logits
    losses_without(model, ["model.layers.0", "model.layers.1"], tokens)
    assert torch.equal(model(tokens).logits, before)
