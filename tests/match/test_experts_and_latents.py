"""Experts in one tensor and latent attention, written by hand: what is admitted, and why the rest is refused."""

from collections.abc import Callable

import pytest
from fixtures import experts, latent
from fixtures.hard_cases import unit_length
from torch import nn

from modegpt_graph.match.analyse import survey
from modegpt_graph.match.sites import Analysis, Site
from modegpt_graph.trace.export import Trace

Analysed = Callable[[Callable[[], nn.Module]], Analysis]


@pytest.fixture(scope="session")
def analysed(traced: Callable[[Callable[[], nn.Module]], Trace], patterns) -> Analysed:
    def of(build: Callable[[], nn.Module]) -> Analysis:
        return survey(traced(build), patterns, "hand-written", "hand-written").analysis

    return of


def of_layer(analysis: Analysis, pattern: str) -> list[Site]:
    return [one for one in analysis.sites if one.pattern == pattern and one.layer == 0]


@pytest.mark.parametrize("form", ["plain", "biased", "split"])
def test_each_expert_of_a_tensor_is_a_site(analysed: Analysed, form: str) -> None:
    sites = of_layer(analysed(lambda: experts.Decoder(form)), "mlp")
    assert len(sites) == experts.EXPERTS
    for number, one in enumerate(sites):
        assert (one.decomposition, one.type, one.commutant) == ("nystrom", "I", "columns"), one.reason
        assert one.id == f"layers.0.experts.{number}:mlp"
        assert one.roles["up"].parameter == "layers.0.experts.up"
        assert one.roles["up"].rows == ((number * experts.HIDDEN, (number + 1) * experts.HIDDEN),)
        assert one.roles["down"].rows == ((number * experts.WIDTH, (number + 1) * experts.WIDTH),)


@pytest.mark.parametrize("form", experts.EACH)
def test_so_is_each_that_is_a_module(analysed: Analysed, form: str) -> None:
    sites = of_layer(analysed(lambda: experts.Decoder(form)), "mlp")
    parameters = [one.roles["down"].parameter for one in sites if one.decomposition == "nystrom"]
    assert parameters == [f"layers.0.experts.experts.{number}.2.weight" for number in range(experts.EXPERTS)]


def test_a_softmax_over_an_experts_features_is_refused(analysed: Analysed) -> None:
    sites = of_layer(analysed(lambda: experts.Decoder("softmax")), "mlp")
    assert len(sites) == experts.EXPERTS
    assert all(one.decomposition is None for one in sites)
    assert sites[0].reason.startswith(f"refused: softmax over the {experts.HIDDEN} features"), sites[0].reason


def test_one_scale_for_the_features_of_all_experts_is_refused(analysed: Analysed) -> None:
    """Experts keep different features: what is one value for a place in all of them cannot follow."""
    sites = of_layer(analysed(lambda: experts.Decoder("scaled")), "mlp")
    assert len(sites) == experts.EXPERTS
    assert all(one.decomposition is None for one in sites)
    assert "for a feature of all experts" in sites[0].reason, sites[0].reason


def test_matrices_of_other_experts_are_no_pair(analysed: Analysed) -> None:
    assert not analysed(lambda: experts.Decoder("uneven")).sites


@pytest.mark.parametrize("first", [False, True])
def test_both_parts_of_latent_scores_are_sites(analysed: Analysed, first: bool) -> None:
    analysis = analysed(lambda: latent.Decoder(first=first))
    names = ("query-key-second", "query-key-first") if first else ("query-key-first", "query-key-second")
    (plain,), (turned,) = (of_layer(analysis, name) for name in names)
    assert (plain.decomposition, plain.commutant, plain.type) == ("svd", "linear", "III"), plain.reason
    assert (plain.groups, plain.full_rank) == (latent.HEADS, latent.PLAIN)
    assert plain.roles["key"].parameter == "layers.0.up.weight"
    assert (turned.decomposition, turned.commutant, turned.block_size) == ("cr", "blocks", 2), turned.reason
    assert (turned.groups, turned.full_rank) == (1, latent.TURNED)
    assert turned.roles["key"].parameter == "layers.0.down.weight"
    head = latent.PLAIN + latent.TURNED
    own = [row for a, b in turned.roles["query"].rows for row in range(a, b)]
    assert own == [n * head + latent.PLAIN + r for n in range(latent.HEADS) for r in range(latent.TURNED)]
    (mixed,) = of_layer(analysis, "value-output")
    assert mixed.decomposition == "svd"


def test_a_norm_on_the_part_without_positions_is_refused(analysed: Analysed) -> None:
    (plain,) = of_layer(analysed(lambda: latent.Decoder(unit_length)), "query-key-first")
    assert plain.decomposition is None
    assert "linalg_vector_norm over the 6 features of a head" in plain.reason, plain.reason
