"""A traced module, written as Python and put back, computes what it did: logits and generation with the cache."""

import ast
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fixtures import llama2c, nanogpt, torchtune_style
from fixtures.library import build
from torch import Tensor, nn

from modegpt_graph.codegen.emit import Forward, emit
from modegpt_graph.codegen.install import install
from modegpt_graph.trace.calls import record_calls
from modegpt_graph.trace.export import export

FAMILIES = """
    llama opt gemma gemma2 gemma3 phi gpt-neox gpt2 phi3 cohere qwen3 olmo2 olmo-clipped smollm3 bloom falcon-old
    falcon-new gptj mpt glm granite mistral-window gpt-oss deepseek-v3
""".split()  # noqa: SIM905
WIDEST = 110


def block_modules(model: nn.Module) -> Iterator[str]:
    """Modules within a decoder layer that hold matrices and compute more than one product."""
    layers = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    depth = layers.count(".") + 2
    for name, module in model.named_modules():
        inside = name.startswith(f"{layers}.") and name.count(".") == depth
        matrices = [parameter for parameter in module.parameters() if parameter.ndim == 2]
        if inside and len(matrices) > 1 and list(module.children()):
            yield name


def written(skeleton: nn.Module, example_inputs: tuple | None = None) -> dict[str, Forward]:
    names = list(block_modules(skeleton))
    assert names
    calls = record_calls(skeleton, names, example_inputs)
    forwards = {}
    for name in names:
        module = skeleton.get_submodule(name)
        if not any(parameter.ndim == 3 for parameter in module.parameters()):  # experts in one tensor are left alone
            forwards[name] = emit(export(module, calls[name]))
    assert forwards
    return forwards


def rewritten(model: nn.Module, forwards: dict[str, Forward]) -> nn.Module:
    other = copy.deepcopy(model)
    for name, forward in forwards.items():
        install(other.get_submodule(name), forward, f"Generated{name.count('.')}")
    return other


def logits(model: Any, ids: Tensor, **keywords: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **keywords).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    """float32, sums of some tens of products in another order at most: far below a part in a million."""
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_generation_are_the_same(family: str) -> None:
    model: Any = build(family, device="cpu")
    model.generation_config.pad_token_id = 0
    other: Any = rewritten(model, written(build(family).to(torch.bfloat16)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (3, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padded on the left
    assert_close(logits(other, ids[:1]), logits(model, ids[:1]))
    assert_close(logits(other, ids, attention_mask=mask), logits(model, ids, attention_mask=mask))
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(other.generate(ids, **arguments), model.generate(ids, **arguments))


@pytest.mark.parametrize("family", ["llama", "phi", "gptj", "cohere", "gpt2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_explicit_positions_are_honoured(family: str, batch: int) -> None:
    model, other = (
        build(family, device="cpu"),
        rewritten(build(family, device="cpu"), written(build(family).to(torch.bfloat16))),
    )
    ids = torch.randint(1, 64, (batch, 5), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(3, 8).expand(batch, -1)
    shifted = logits(model, ids, position_ids=positions)
    assert_close(logits(other, ids, position_ids=positions), shifted)
    if family == "gpt2":  # learned positions: the logits do depend on them
        assert not torch.allclose(shifted, logits(model, ids))


STYLES: dict[str, Callable[[], nn.Module]] = {
    "nanogpt": nanogpt.GPT,
    "nanogpt-flash": lambda: nanogpt.GPT(flash=True),
    "llama2c": llama2c.Transformer,
    "llama2c-real": lambda: llama2c.Transformer(is_complex=False),
    "torchtune": torchtune_style.TransformerDecoder,
    "torchtune-norms": lambda: torchtune_style.TransformerDecoder(has_norms=True),
}


@pytest.mark.parametrize("style", STYLES)
def test_hand_written_decoders(style: str) -> None:
    make = STYLES[style]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    with torch.device("meta"):
        skeleton = make().eval()
    other = rewritten(model, written(skeleton, (torch.zeros(1, 8, dtype=torch.long),)))
    for batch, length in ((1, 8), (3, 5), (2, 1)):
        ids = torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            assert_close(other(ids), model(ids))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-new", "phi", "gpt-neox"])
def test_the_source_reads_like_python_that_a_person_wrote(family: str) -> None:
    for forward in written(build(family)).values():
        ast.parse(forward.source)
        assert "dropout(" not in forward.source
        assert max(map(len, forward.source.splitlines())) <= WIDEST - 4  # it stands in a class
        assert "numpy_T" not in forward.source


def test_observers_see_the_values_as_they_come() -> None:
    skeleton = build("llama")
    name = "model.layers.0.mlp"
    trace = export(skeleton.get_submodule(name), record_calls(skeleton, [name])[name])
    down = next(node for node in reversed(trace.graph.nodes) if "linear" in node.name)
    model = build("llama", device="cpu")
    module: Any = model.get_submodule(name)
    seen: dict[str, Tensor] = {}
    install(module, emit(trace, observed={"features": down.args[0]}), "Observed")
    module.observe = lambda key, value: seen.__setitem__(key, value)
    inputs = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module(inputs)
        expected = module.act_fn(module.gate_proj(inputs)) * module.up_proj(inputs)
    assert torch.equal(seen["features"], expected)
