"""Rotation alone changes nothing; slicing keeps the strongest directions; what cannot be rotated is told."""

import pytest
import torch
from fixtures.hard_cases import Decoder
from fixtures.library import build
from torch import nn

from modegpt_graph.methods.common import Unavailable
from modegpt_graph.methods.norms import recognise
from modegpt_graph.methods.slicegpt import principal_components, removed_at, sliced, slicegpt
from modegpt_graph.methods.stream import find_stream
from modegpt_graph.models import forward_logits


@pytest.mark.parametrize(
    ("name", "steps"),
    [("llama", 4), ("llama with biases", 4), ("opt", 4), ("gemma", 4), ("phi", 2), ("gpt-neox", 2), ("gpt2", 4)],
)
def test_rotation_alone_is_exact(name: str, steps: int, setting) -> None:
    """Theorem 1: at full width the logits are those of the dense model."""
    one = setting(name)
    stream = find_stream(one)
    assert len(stream.steps) == steps
    bases = principal_components(one, stream)
    assert not torch.allclose(bases[0], bases[1])
    rotated = sliced(one, stream, bases, stream.width)
    with torch.no_grad():
        before, after = forward_logits(one.dense, one.tokens), forward_logits(rotated, one.tokens)
    # float32, two layers, weights six times as large as usual
    assert float((before - after).abs().max()) < 1e-3 * float(before.abs().max())


@pytest.mark.parametrize(
    "name", ["cohere", "glm", "falcon-new", "mistral-window", "gptj", "qwen3", "granite", "plain modules"]
)
def test_rotation_alone_is_exact_for_other_models(name: str, setting) -> None:
    one = setting(plain() if name == "plain modules" else build(name, "cpu"))
    stream = find_stream(one)
    rotated = sliced(one, stream, principal_components(one, stream), stream.width)
    with torch.no_grad():
        before, after = forward_logits(one.dense, one.tokens), forward_logits(rotated, one.tokens)
    assert float((before - after).abs().max()) < 1e-3 * float(before.abs().max())


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Decoder(residual=0.5).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "comes from `mul` in model.layers.0.post_attention_layernorm, not from a matrix module"),
        ("olmo2", "the residual stream is read by .*, which is no norm module"),
        ("mixtral", "is read by `linear`, which is no matrix module"),
    ],
)
def test_what_cannot_be_rotated_is_told(name: str, reason: str, setting) -> None:
    with pytest.raises(Unavailable, match=reason):
        slicegpt(setting(build(name, "cpu")))


def test_slicing_keeps_what_carries_most(setting) -> None:
    """Sliced to half, the stream that the norms read keeps more energy than any random half would."""
    one = setting("llama")
    stream = find_stream(one)
    bases = principal_components(one, stream)
    for basis in bases:
        torch.testing.assert_close(basis.T @ basis, torch.eye(stream.width, dtype=torch.float64))
    with torch.no_grad():
        dense = forward_logits(one.dense, one.tokens)

        def lost(chosen: list[torch.Tensor]) -> float:
            return float((forward_logits(sliced(one, stream, chosen, stream.width // 2), one.tokens) - dense).norm())

        assert lost(bases) < lost([basis.flip(1) for basis in bases])


@pytest.mark.parametrize(("name", "width"), [("llama", 20), ("opt", 20), ("phi", 40)])
def test_what_is_counted_is_what_the_model_holds(name: str, width: int, setting) -> None:
    one = setting(name)
    stream = find_stream(one)
    smaller = sliced(one, stream, principal_components(one, stream), width)
    held = [sum(p.numel() for p in model.parameters() if p.ndim > 1) for model in (one.dense, smaller)]
    assert removed_at(one, stream, width) == held[0] - held[1]


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_is_recognised_by_what_it_does(kind: str) -> None:
    torch.manual_seed(1)
    module = nn.RMSNorm(24, eps=3e-5) if kind == "rms" else nn.LayerNorm(24, eps=3e-5)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    norm = recognise(module.requires_grad_(False), 24)
    assert norm is not None
    assert norm.kind == kind
    assert norm.epsilon == pytest.approx(3e-5, rel=1e-3)
    torch.testing.assert_close(norm.scale.float(), module.weight)
    x = torch.randn(3, 24)
    torch.testing.assert_close(norm(x.double()).float(), module(x))


@pytest.mark.parametrize("module", [nn.Tanh(), nn.Identity(), nn.Softmax(-1), nn.Linear(24, 24), nn.GroupNorm(4, 24)])
def test_other_modules_are_no_norms(module: nn.Module) -> None:
    assert recognise(module.requires_grad_(False), 24) is None
