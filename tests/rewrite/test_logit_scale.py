"""The norm before the logits is found whatever it is, and takes the scale that the logits have lost."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures.library import build
from torch import Tensor, nn

from modegpt_graph.evaluate import kl_divergence
from modegpt_graph.models import forward_logits
from modegpt_graph.rewrite.logit_scale import find_logit_scale
from modegpt_graph.rewrite.recalibrate import recalibrate

VOCABULARY, WIDTH = 32, 16


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 24, (16, 64), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "path", "parameters"),
    [
        ("llama", "model.norm", {"weight"}),
        ("gemma2", "model.norm", {"weight"}),
        ("gpt-neox", "gpt_neox.final_layer_norm", {"weight", "bias"}),
    ],
)
def test_the_last_norm_is_found_and_scales_its_output(name: str, path: str, parameters: set[str]) -> None:
    model = build(name, "cpu")
    prefix = path.rsplit(".", 1)[0]
    layers = [f"{prefix}.layers.{index}" for index in range(model.config.num_hidden_layers)]
    for own in model.get_submodule(path).parameters():
        own.data += torch.rand_like(own)
    found = find_logit_scale(model, layers, tokens()[:1], [tokens()])
    assert found is not None
    assert (found.path, set(found.shares)) == (path, parameters)
    module = model.get_submodule(path)
    given = torch.randn(7, module.weight.shape[0])
    before = module(given)
    for own, value in found.scaled(module, 0.8).items():
        module.get_parameter(own).data = value
    torch.testing.assert_close(module(given), 0.8 * before, rtol=1e-3, atol=1e-4)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.inner(stream)


class Decoder(nn.Module):
    """last: what logits come of, from normed rows."""

    def __init__(self, norm: nn.Module, last: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Layer()])
        self.norm, self.head, self.last = norm, nn.Linear(WIDTH, VOCABULARY), last

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens)
        for layer in self.layers:
            stream = layer(stream)
        return self.head(self.last(self.norm(stream)))


class Saturated(nn.LayerNorm):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows).tanh()


def test_a_norm_is_not_scaled_where_that_does_not_scale_what_it_puts_out() -> None:
    bare = nn.LayerNorm(WIDTH, elementwise_affine=False)
    shared = Decoder(nn.LayerNorm(WIDTH))
    shared.layers[0].norm = shared.norm
    models = Decoder(nn.LayerNorm(WIDTH)), Decoder(Saturated(WIDTH)), Decoder(bare), shared
    found = [find_logit_scale(model, ["layers.0"], tokens()[:1], [tokens()]) for model in models]
    assert [one is not None for one in found] == [True, False, False, False]


def test_a_norm_is_not_scaled_where_logits_tell_of_other_tokens() -> None:
    model = Decoder(nn.LayerNorm(WIDTH), lambda rows: rows.cumsum(1))
    assert find_logit_scale(model, ["layers.0"], tokens()[:1], [tokens()]) is None


def test_logits_that_are_too_large_are_scaled_back() -> None:
    dense: Any = build("llama", "cpu")
    dense.lm_head.weight.data *= 50
    smaller = copy.deepcopy(dense)
    smaller.model.norm.weight.data *= 1.2
    layers = [f"model.layers.{index}" for index in range(len(dense.model.layers))]
    consumers = {path: True for path, _ in dense.named_modules() if path.endswith(("o_proj", "down_proj"))}
    before = kl_divergence(dense, smaller, tokens(1))
    found = recalibrate(dense, smaller, layers, consumers, [tokens()])
    assert found.logit_scale == pytest.approx(1 / 1.2, rel=0.01)
    assert kl_divergence(dense, smaller, tokens(1)) < 0.01 * before
    assert forward_logits(smaller, tokens()).shape == (*tokens().shape, dense.config.vocab_size)
