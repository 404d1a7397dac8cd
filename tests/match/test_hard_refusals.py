"""What looks like a hard case and is not one is refused, or taken for no more than it is, and the reason says why."""

from collections.abc import Callable

import pytest
import torch
from fixtures import fused
from fixtures import hard_refusals as forms
from fixtures.hard_cases import Attention, half_split
from fixtures.hard_cases import Decoder as Usual
from torch import Tensor, nn

from modegpt_graph.match.analyse import survey
from modegpt_graph.match.sites import Analysis, Site
from modegpt_graph.trace.export import Trace

Analysed = Callable[[Callable[[], nn.Module]], Analysis]
Feature = Callable[[Tensor], Tensor]


@pytest.fixture(scope="session")
def analysed(traced: Callable[[Callable[[], nn.Module]], Trace], patterns) -> Analysed:
    def of(build: Callable[[], nn.Module]) -> Analysis:
        return survey(traced(build), patterns, "hand-written", "hand-written").analysis

    return of


def site(analysis: Analysis, pattern: str) -> Site:
    return next(one for one in analysis.sites if one.pattern == pattern and one.layer == 0)


def left(analysis: Analysis, matrix: str) -> str:
    return next(one.reason for one in analysis.unmatched if one.parameter.endswith(f".0.inner.{matrix}.weight"))


@pytest.mark.parametrize(
    ("position", "reason"),
    [
        (forms.neighbours, "refused: add: every feature depends on the others"),
        (forms.half_split_then_mixed, "refused: mul, neg and add: every feature depends on the others"),
        (forms.clipped_by_norm, "refused: linalg_vector_norm over the 8 features of a head: every feature depends"),
        (forms.turned_all_together, "refused: matmul: every feature depends on the others"),
    ],
)
def test_features_that_meet_on_queries_and_keys(analysed: Analysed, position: Feature, reason: str) -> None:
    one = site(analysed(lambda: Usual(Attention(position))), "query-key")
    assert one.decomposition is None
    assert one.reason.startswith(reason)
    if one.between:
        assert "; found: with feature 0 set to zero, feature" in one.reason


@pytest.mark.parametrize("position", [forms.capped, forms.multiplied_by_feature])
def test_a_cap_or_multiplier_on_features_costs_the_svd(analysed: Analysed, position: Feature) -> None:
    one = site(analysed(lambda: Usual(Attention(position))), "query-key")
    assert (one.commutant, one.decomposition, one.certificate.holds) == ("columns", "cr", True)


def test_rotary_on_values_is_refused(analysed: Analysed) -> None:
    one = site(analysed(lambda: Usual(Attention(value=half_split))), "value-output")
    assert one.decomposition is None
    assert "but rotary (half-split) couples features in blocks of 2; found: feature 1 added to feature 0" in one.reason


def test_a_sink_that_is_a_vector_of_features_is_refused(analysed: Analysed) -> None:
    analysis = analysed(lambda: forms.Decoder(lambda: forms.Alone(forms.Attention(sink=True))))
    assert "come from elsewhere" in site(analysis, "query-key").reason
    assert "the features cannot be followed to `reshape`" in site(analysis, "value-output").reason
    assert not any(one.decomposition for one in analysis.sites)


def mlp(analysed: Analysed, hidden: forms.Hidden) -> Analysis:
    return analysed(lambda: forms.Decoder(lambda: forms.Alone(forms.MLP(hidden))))


def test_a_norm_within_the_pair_is_named(analysed: Analysed) -> None:
    one = site(mlp(analysed, forms.sub_normed), "gated-mlp")
    assert one.decomposition is None
    assert one.reason.startswith("refused: layer_norm over the 48 features")
    assert "; found: with feature 0 set to zero, feature" in one.reason


def test_a_product_of_features_of_one_matrix_ties_them_in_twos(analysed: Analysed) -> None:
    one = site(mlp(analysed, forms.mirrored), "gated-mlp")
    assert (one.commutant, one.block_size, one.decomposition) == ("blocks", 2, None)
    assert (
        "`nystrom` claims that each feature can be dropped alone, but mul couples features in blocks of 2" in one.reason
    )
    assert "; found: with feature 0 set to zero, feature 47 went from" in one.reason


def test_gate_and_up_that_share_rows_of_a_fused_projection(analysed: Analysed) -> None:
    one = site(analysed(lambda: forms.Decoder(lambda: forms.Alone(forms.OverlappingMLP()))), "gated-mlp")
    assert (one.block_size, one.decomposition) == (2, None)
    assert "but silu and mul couple features in blocks of 2" in one.reason


@pytest.mark.parametrize(
    ("hidden", "matrix", "reason"),
    [
        (
            forms.clamped_by_itself,
            "down",
            "expected the matrix `up`, found `minimum` in `blocks.0.inner` (hard_refusals.py:",
        ),
        (forms.added, "down", "it multiplies what comes from `add`"),
    ],
)
def test_what_is_no_activation_or_gate_is_left_with_the_reason(
    analysed: Analysed, hidden: forms.Hidden, matrix: str, reason: str
) -> None:
    analysis = mlp(analysed, hidden)
    assert not analysis.sites
    assert reason in left(analysis, matrix)


def test_a_softmax_that_stands_for_an_activation_is_named(analysed: Analysed) -> None:
    one = site(mlp(analysed, forms.squared_softmax), "mlp")
    assert (one.variant, one.decomposition) == ("other", None)
    assert one.reason.startswith("refused: softmax over the 48 features")


def test_a_scale_for_every_feature_in_place_of_an_activation_costs_the_svd(analysed: Analysed) -> None:
    one = site(mlp(analysed, forms.scaled), "mlp")
    assert (one.variant, one.commutant, one.decomposition) == ("other", "columns", "nystrom")


@pytest.mark.parametrize("joint", [None, "side by side"])
def test_parallel_blocks_are_sites_of_their_own_where_one_matrix_reads_both(
    analysed: Analysed, joint: str | None
) -> None:
    analysis = analysed(lambda: forms.Decoder(lambda: forms.Block(forms.Attention(), forms.MLP(forms.gated), joint)))
    assert analysis.coverage == 1.0
    assert {one.pattern for one in analysis.sites} == {"query-key", "value-output", "gated-mlp"}
    assert all(one.decomposition is not None for one in analysis.sites)


def test_parallel_blocks_that_are_added_before_one_matrix_are_left(analysed: Analysed) -> None:
    analysis = analysed(lambda: forms.Decoder(lambda: forms.Block(forms.Attention(), forms.MLP(forms.gated), "added")))
    assert {one.pattern for one in analysis.sites} == {"query-key"}
    reasons = {one.parameter: one.reason for one in analysis.unmatched}
    assert "it multiplies what comes from `add`" in reasons["blocks.0.joint.weight"]


def test_the_forms_run() -> None:
    """On real tensors too, so that none is refused for an error of its own."""
    ids = torch.zeros(1, 5, dtype=torch.long)
    for position in (forms.capped, forms.neighbours, forms.clipped_by_norm, forms.turned_all_together):
        assert Usual(Attention(position))(ids).isfinite().all()
    for hidden in (forms.sub_normed, forms.squared_softmax, forms.clamped_by_itself, forms.mirrored):
        assert forms.Decoder(lambda hidden=hidden: forms.Alone(forms.MLP(hidden)))(ids).isfinite().all()


@pytest.mark.parametrize(
    ("attention", "pattern", "reason"),
    [
        (
            lambda: fused.Attention(is_normed=True),
            "value-output",
            "refused: the norm `projection_norm` (layer_norm over all 64 features, across heads): every feature",
        ),
        (
            lambda: fused.Attention(fused.rest_normed),
            "query-key",
            "refused: layer_norm over the 4 features of a head: every feature depends on the others",
        ),
        (fused.Overlapping, "query-key", "refused: two heads share some features but not all of them"),
    ],
    ids=["a norm before the split", "a norm of what is not rotated", "heads that overlap"],
)
def test_fused_and_grouped_heads_whose_features_are_not_free(
    analysed: Analysed, attention: Callable[[], nn.Module], pattern: str, reason: str
) -> None:
    analysis = analysed(lambda: fused.Decoder(attention))
    one = site(analysis, pattern)
    assert one.decomposition is None
    assert one.reason.startswith(reason)
    assert site(analysis, "gated-mlp").decomposition == "nystrom"


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("scaled", "the matrix that is multiplied is computed from it on every call, by `mul`"),
        ("stacked", "it holds 2 times 48×32 values in one tensor, and each is taken alone, to `linear`"),
        (
            "convolution",
            "it is the kernel of a convolution of one position (`conv1d`): as a linear",
        ),
        ("added", "expected the matrix `up`, found `add` in `blocks.0.inner` (hard_refusals.py:"),
    ],
)
def test_what_is_multiplied_and_is_no_parameter_of_its_own(analysed: Analysed, form: str, reason: str) -> None:
    analysis = analysed(lambda: forms.Decoder(lambda: forms.Alone(forms.Indirect(form))))
    assert any(reason in one.reason for one in analysis.unmatched), [one.reason for one in analysis.unmatched]
    assert analysis.coverage < 1.0
