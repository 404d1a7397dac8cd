"""A certificate is computed: it holds for what is true, and a false claim is refuted by a large deviation."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fixtures.hard_cases import Attention, Decoder, clipped, half_split, softmax_features
from torch import nn

from modegpt_graph.flow.layout import Kind
from modegpt_graph.match.footprint import Footprint, locate, outline
from modegpt_graph.match.matcher import Matcher
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.probe import probe_mixing, probe_selection
from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.graph import normalise

Located = Callable[[Trace, str], Footprint]


@pytest.fixture
def footprint(patterns: tuple[Pattern, ...]) -> Located:
    def of(trace: Trace, name: str) -> Footprint:
        graph = normalise(trace)
        pattern = next(one for one in patterns if one.name == name)
        return locate(outline(graph, Matcher(graph).find(pattern)[0][0]))

    return of


def as_single_columns(found: Footprint) -> Footprint:
    """The claim that every column of a head can be chosen alone."""
    groups, size = found.layout.fibres.shape
    positions = torch.arange(size).view(1, size, 1).expand(groups, -1, -1)
    single = replace(found.layout, kinds=(Kind(positions),))
    return replace(found, one=single, layout=single)


def test_single_columns_under_rotary_are_refuted(library_trace, footprint: Located) -> None:
    found = footprint(library_trace("llama"), "query-key")
    assert probe_selection(found).holds
    wrong = probe_selection(as_single_columns(found))
    assert not wrong.holds
    assert wrong.obstacle is not None or (wrong.max_error or 0) > 0.1


def test_mixing_under_rotary_is_refuted(library_trace, footprint: Located) -> None:
    found = footprint(library_trace("llama"), "query-key")
    wrong = probe_mixing(as_single_columns(found))
    assert not wrong.holds
    assert wrong.obstacle is not None or (wrong.max_error or 0) > 0.1


def test_mixing_under_an_activation_or_a_clamp_is_refuted(traced, library_trace, footprint: Located) -> None:
    mlp = footprint(library_trace("llama"), "gated-mlp")
    assert probe_selection(mlp).holds
    assert (probe_mixing(mlp).max_error or 0) > 0.1
    # Random inputs of a probe are within the clamp's bounds too seldom to be told apart unless the bounds are narrow.
    value = footprint(traced(lambda: Decoder(Attention(value=lambda x: clipped(8 * x)))), "value-output")
    assert probe_selection(value).holds
    assert (probe_mixing(value).max_error or 0) > 0.1


def test_mixing_where_nothing_stands_between_holds(library_trace, footprint: Located) -> None:
    for name in ("opt", "bloom", "falcon-alibi"):
        assert probe_mixing(footprint(library_trace(name), "query-key")).holds


def test_dropping_columns_under_a_softmax_is_refuted(traced, footprint: Located) -> None:
    def build() -> nn.Module:
        return Decoder(Attention(softmax_features))

    wrong = probe_selection(as_single_columns(footprint(traced(build), "query-key")))
    assert (wrong.max_error or 0) > 0.1


def test_whole_pairs_hold_whatever_the_seed(traced, footprint: Located) -> None:
    found = footprint(traced(lambda: Decoder(Attention(half_split))), "query-key")
    assert all(probe_selection(found, seed).holds for seed in range(5))
