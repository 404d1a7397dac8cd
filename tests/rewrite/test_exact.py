"""The error that the report states is the error that one measures: original and rewritten module, calibration inputs.

The measurement knows nothing of the observers: outputs are taken by hooks on the library's own modules, queries and
keys by an attention function of the library's interface. float64, so that nothing but the mathematics is compared.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fixtures.families import FAMILIES, Shrunk, shrink, shrunk
from torch import Tensor

from modegpt_graph.match.sites import Site
from modegpt_graph.rewrite.apply import rewrite

EXACT = 1e-6  # float64, and errors of at least 1e-6 of the output: far from rounding


@contextmanager
def attention_operands() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Queries (B, H, S, d) and keys (B, H/g, S, d) as they reach the attention interface, call by call."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[tuple[Tensor, Tensor]] = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((query, key))
        return original(module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
    try:
        yield seen
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original


def output_of(model: Any, path: str, tokens: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    (output,) = seen
    return output.flatten(0, -2)  # (T, D)


def scores_of(model: Any, layer: int, tokens: Tensor) -> Tensor:
    """(H, T, T) products of all queries with all keys of a layer, across windows too."""
    with attention_operands() as seen, torch.no_grad():
        model(tokens, use_cache=False)
    query, key = seen[layer]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    query, key = (value.transpose(0, 1).flatten(1, 2) for value in (query, key))  # (H, T, d)
    return query @ key.mT


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().sum() / expected.square().sum())


def consumer_path(site: Site) -> str | None:
    """The module that is fitted again; None at a query/key site."""
    role = next((site.roles[name] for name in ("down", "output") if name in site.roles), None)
    return None if role is None else role.parameter.rpartition(".")[0]


def measured(one: Shrunk, site: Site) -> float:
    """The error of one site alone: all others, and so all that reaches this one, are as they were."""
    changed = copy.deepcopy(one.dense)
    rewrite(changed, one.modules, {site.id: one.result._solutions[site.id]})
    path = consumer_path(site)
    if path is not None:
        return relative(output_of(changed, path, one.tokens), output_of(one.dense, path, one.tokens))
    assert site.layer is not None
    return relative(*(scores_of(model, site.layer, one.tokens) for model in (changed, one.dense)))


def reported(one: Shrunk) -> dict[str, float]:
    return {site["id"]: site["relative_error"] for site in one.result.report.to_json()["sites"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reported_error_is_the_measured_one(name: str) -> None:
    one = shrunk(name)
    stated = reported(one)
    sites = [site for site in one.result.report.sites if site.id in one.result._solutions]
    assert {site.type for site in sites} == ({"I", "III"} if "opt" in name or name == "gpt2" else {"I", "II", "III"})
    for site in sites:
        assert stated[site.id] > 1e-6, f"{site.id} lost nothing: this test would hold for any error"
        assert measured(one, site) == pytest.approx(stated[site.id], rel=EXACT), site.id


def test_in_float32_too() -> None:
    """Sums over 96 tokens in float32: a part in a thousand is far more than rounding takes."""
    one = shrink("llama", torch.float32)
    stated = reported(one)
    for site in one.result.report.sites:
        assert measured(one, site) == pytest.approx(stated[site.id], rel=1e-3), site.id
