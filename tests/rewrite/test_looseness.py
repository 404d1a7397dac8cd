"""Recalibration starts from looser features where fits to the calibration text then err less on other text."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fixtures.families import family, tokens
from torch import Tensor

import modegpt_graph as mg
from modegpt_graph.calibrate.statistics import ConsumerStatistics
from modegpt_graph.compression import prepare
from modegpt_graph.models import resolve
from modegpt_graph.rewrite.decomposed import Decomposed


def unrelated(gram: Tensor) -> Tensor:
    """Of features with these sizes and means, where none tells of another."""
    means = gram[:, -1:] @ gram[-1:] / gram[-1, -1]
    return means + torch.diag((gram - means).diagonal())


def decomposed(of_other: Callable[[Tensor], Tensor]) -> Decomposed:
    """With as much other text, in which features go together as `of_other` makes of those in the calibration text."""
    found = prepare(resolve(family("llama with biases")), calibration=tokens(60), evaluating=False).decomposed
    text, other = {}, {}
    for site, one in found.observed.statistics.items():
        text[site] = one
        if isinstance(one, ConsumerStatistics):
            other[site] = ConsumerStatistics(of_other(one.gram))
            text[site] = ConsumerStatistics(one.gram + other[site].gram)
    return replace(found, observed=replace(found.observed, statistics=text, other=other))


def test_fits_start_looser_where_features_go_together_in_the_calibration_text_alone() -> None:
    found = decomposed(unrelated)
    first = found.solutions(found.ranks(0.5))
    solutions = found.solutions(found.ranks(0.5), recalibrates=True)
    kinds = {one.kind[0]: one for one in found.looseness.values()}
    assert kinds.keys() == {"value-output", "gated-mlp"}
    assert all(one.helps and one.ratio < 1 for one in kinds.values())
    assert solutions.keys() == first.keys()
    for site, one in first.items():
        start = solutions[site]
        if not isinstance(found.observed.statistics[site], ConsumerStatistics):
            torch.testing.assert_close((start.kept, start.maps), (one.kept, one.maps), rtol=0, atol=0)
            assert start.relative_error == one.relative_error
            continue
        assert [kept.shape for kept in start.kept] == [kept.shape for kept in one.kept]
        assert start.relative_error is None
        ((rows, _),), ((plain, _),) = start.refits.values(), one.refits.values()
        assert not torch.allclose(rows, plain, rtol=1e-3)
    (said,) = (one for one in found.said("curves", recalibrates=True) if one.startswith("Recalibration of gated-mlp"))
    assert f"err {kinds['gated-mlp'].ratio:.2f} times as much" in said
    assert "as if features went together 0.5 times as much" in said


def test_fits_start_as_features_go_together_where_they_do_in_other_text_too() -> None:
    found = decomposed(lambda gram: gram)
    assert not found.loosened
    assert all(one.ratio > 1 for one in found.looseness.values())
    assert all("starts as features go together" in said for said in found.said("curves", recalibrates=True)[-2:])


def test_sites_that_recalibration_does_not_reach_are_not_loosened() -> None:
    found = decomposed(unrelated)
    assert found.loosened
    unknown = replace(found, layers=())  # of no layers it is known what enters the stream
    assert not unknown.loosened


@pytest.mark.parametrize("recalibrate", [True, False])
def test_the_report_says_it_of_models_that_are_recalibrated(recalibrate: bool) -> None:
    outcome = mg.compress(family("llama"), 0.3, calibration=tokens(60), recalibrate=recalibrate).report.outcome
    assert outcome is not None
    assert sum(said.startswith("Recalibration of") for said in outcome.choices) == 2 * recalibrate


def test_one_text_alone_gives_no_reason_to_start_looser() -> None:
    found = prepare(resolve(family("llama")), calibration=tokens(), other_text=False, evaluating=False).decomposed
    assert found.looseness == {}
