"""The influence of a block is that of what it adds to the residual stream; outliers are counted as OWL counts them."""

from typing import Any

import pytest
import torch
from fixtures.families import family, tokens
from torch import Tensor

from modegpt_graph.calibrate.blocks import block_influence, blocks_of
from modegpt_graph.calibrate.outliers import MULTIPLE, outlier_shares
from modegpt_graph.compression import prepare
from modegpt_graph.match.prepare import Surveyed, read_patterns, survey_model
from modegpt_graph.models import resolve


def surveyed(model: Any) -> Surveyed:
    return survey_model(resolve(model), read_patterns())


def heard(model: Any, ids: Tensor, paths: list[str], inputs: bool = False) -> list[Tensor]:
    """What modules return, or are given first."""
    found: dict[str, Tensor] = {}

    def keep(path: str, given: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        value = next(iter((*given, *keywords.values()))) if inputs else output
        found[path] = value[0] if isinstance(value, tuple) else value

    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, given, keywords, output, path=path: keep(path, given, keywords, output), with_kwargs=True
        )
        for path in paths
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return [found[path] for path in paths]


def influence(before: Tensor, after: Tensor) -> float:
    return 1 - float(torch.cosine_similarity(before, after, dim=-1).mean())


@pytest.mark.parametrize(
    ("name", "layer", "attention"),
    [("llama", "model.layers.{}", "self_attn"), ("gpt2", "transformer.h.{}", "attn")],
)
def test_attention_and_mlp_are_scored_apart_where_each_adds_to_the_stream(
    name: str, layer: str, attention: str
) -> None:
    model, ids = family(name), tokens()
    blocks = blocks_of(surveyed(model))
    expected = []
    for number in range(2):
        path = layer.format(number)
        (start,) = heard(model, ids, [path], inputs=True)
        added, end = heard(model, ids, [f"{path}.{attention}", path])
        expected += [influence(start, start + added), influence(start + added, end)]
    assert len(blocks) == 4
    assert sorted(block_influence(model, blocks, ids)) == pytest.approx(sorted(expected), rel=1e-3)  # type: ignore[type-var]
    assert all(len({site.rsplit(":")[0].split(".")[-1] for site in block.sites}) == 1 for block in blocks)


def test_what_is_added_at_one_place_is_one_block() -> None:
    model, ids = family("gpt-neox"), tokens()
    blocks = blocks_of(surveyed(model))
    expected = []
    for number in range(2):
        path = f"gpt_neox.layers.{number}"
        expected.append(influence(heard(model, ids, [path], inputs=True)[0], heard(model, ids, [path])[0]))
    assert [len(block.sites) for block in blocks] == [3, 3]
    assert block_influence(model, blocks, ids) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "layer", "kind", "matrices"), [("llama", "layers", "Linear", 7), ("gpt2", "h", "Conv1D", 4)]
)
def test_outliers_are_counted_over_all_matrices_of_a_layer(name: str, layer: str, kind: str, matrices: int) -> None:
    model, ids = family(name), tokens()
    found = outlier_shares(model, surveyed(model), ids)
    for number in range(2):
        paths = [
            path
            for path, part in model.named_modules()
            if f"{layer}.{number}." in path and part.__class__.__name__ == kind
        ]
        read = heard(model, ids, paths, inputs=True)
        stored = [model.get_submodule(path).weight.abs() for path in paths]
        weights = [one.T if kind == "Conv1D" else one for one in stored]  # (out, in)
        scores = torch.cat(
            [(one * x.flatten(0, 1).norm(dim=0)).flatten() for one, x in zip(weights, read, strict=True)]
        )
        share = float((scores > MULTIPLE * scores.mean()).double().mean())
        assert len(paths) == matrices
        assert float(found[number]) == pytest.approx(share, abs=2 / len(scores))  # entries at the limit itself


@pytest.mark.parametrize("allocator", ["split-influence", "owl"])
def test_the_ratio_is_met_by_both(allocator: str) -> None:
    decomposed = prepare(resolve(family("llama")), calibration=tokens()).decomposed
    ranks = decomposed.ranks(0.3, allocator)
    assert decomposed.removed(ranks) / decomposed.total == pytest.approx(0.3, abs=0.005)
