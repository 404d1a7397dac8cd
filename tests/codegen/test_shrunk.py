"""Fewer query and key features, every value feature: a fused projection with parts of different sizes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.library import build
from torch import Tensor, nn

from modegpt_graph.codegen.emit import emit
from modegpt_graph.codegen.install import install
from modegpt_graph.flow.shrink import Selection, shrink
from modegpt_graph.match.footprint import Footprint, locate, outline
from modegpt_graph.match.matcher import Matcher
from modegpt_graph.match.pattern_file import load_patterns
from modegpt_graph.match.probe import random_blocks, selection_of
from modegpt_graph.trace.calls import record_calls
from modegpt_graph.trace.export import Trace, export
from modegpt_graph.trace.graph import normalise

PATTERNS = load_patterns([Path(__file__).parents[2] / "patterns"])
ATTENTION = {
    "llama": "model.layers.0.self_attn",
    "phi3": "model.layers.0.self_attn",
    "gpt-neox": "gpt_neox.layers.0.attention",
    "bloom": "transformer.h.0.self_attention",
    "falcon-old": "transformer.h.0.self_attention",
    "falcon-new": "transformer.h.0.self_attention",
    "falcon-alibi": "transformer.h.0.self_attention",
    "mpt": "transformer.blocks.0.attn",
}


def query_key(trace: Trace) -> Footprint:
    graph = normalise(trace)
    pattern = next(one for one in PATTERNS if one.name == "query-key")
    return locate(outline(graph, Matcher(graph).find(pattern)[0][0]))


def kept_rows(line: Tensor, selection: Selection, offset: int) -> Tensor:
    """Old row of each row that the smaller matrix has."""
    places = torch.arange(len(line))
    own = line >= 0
    stays = torch.where(own, selection.keep[line.clamp(min=0)], True)
    return torch.where(own, selection.source[line.clamp(min=0)] - offset, places)[stays]


@pytest.mark.parametrize("family", ATTENTION)
def test_dropping_query_key_features_is_the_same_as_zeroing_them(family: str) -> None:
    name = ATTENTION[family]
    skeleton = build(family)
    trace = export(skeleton.get_submodule(name), record_calls(skeleton, [name])[name])
    found = query_key(trace)
    kept = random_blocks(found.layout, torch.Generator().manual_seed(0))
    selection = selection_of(found.layout, kept, found.members, found.flow.classes.count)
    edits = shrink(found.outline.region, found.flow, selection)

    zeroed, smaller = build(family, device="cpu"), build(family, device="cpu")
    shrunk: dict[str, Tensor] = {}
    lines: dict[str, Tensor] = {}
    for linear in found.outline.producers.values():
        labels: Any = found.flow.labels[linear.node]
        line = lines[linear.weight] = lines.get(
            linear.weight, torch.full_like(labels.reshape(-1, labels.shape[-1])[0], -1)
        )
        line.copy_(torch.maximum(line, labels.reshape(-1, labels.shape[-1])[0]))
    for weight, line in lines.items():
        rows = shrunk[weight] = kept_rows(line, selection, found.offsets[weight])
        gone = torch.ones(len(line), dtype=torch.bool)
        gone[rows] = False
        assert gone.any()
        linear: Any = zeroed.get_submodule(f"{name}.{weight.removesuffix('.weight')}")
        linear.weight.data[gone] = 0
        if linear.bias is not None:
            linear.bias.data[gone] = 0
        resize(smaller.get_submodule(name), weight.removesuffix(".weight"), rows)
    paths = [weight.removesuffix(".weight") for weight in shrunk]
    install(smaller.get_submodule(name), emit(trace, edits, paths), "Smaller")

    for batch, length in ((3, 6), (1, 4)):
        ids = torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected, result = zeroed(ids).logits, smaller(ids).logits
        assert float((result - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def resize(module: nn.Module, path: str, rows: Tensor) -> None:
    """A plain linear layer with some of the rows of another one."""
    old: Any = copy.deepcopy(module.get_submodule(path))
    new = nn.Linear(old.in_features, len(rows), bias=old.bias is not None).requires_grad_(False)
    new.weight.copy_(old.weight[rows])
    if old.bias is not None:
        new.bias.copy_(old.bias[rows])
    module.set_submodule(path, new)
