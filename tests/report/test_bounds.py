"""Theory beside measurement: told once for each kind of site, and a violated bound is called what it is."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from modegpt_graph.report.bound_chart import bound_chart
from modegpt_graph.report.bounds import bound_series, violations
from modegpt_graph.report.console import render_outcome
from modegpt_graph.report.html import to_html
from modegpt_graph.report.schema import from_json, to_json
from modegpt_graph.rewrite.bounds import BoundPoint, is_within


def console_text(analysis, outcome) -> str:
    file = io.StringIO()
    render_outcome(analysis, outcome, Console(file=file, width=120, highlight=False))
    return re.sub(r"\s+", " ", file.getvalue())


def planted(outcome, number: int, **changed):
    """The outcome with one site changed."""
    sites = list(outcome.sites)
    sites[number] = replace(sites[number], **changed)
    return replace(outcome, sites=tuple(sites))


def test_kinds_are_told_once_with_their_proposition_and_how_loose_it_is(samples):
    analysis = samples.analysis()
    series = bound_series(analysis, samples.outcome(analysis))
    assert [(one.proposition, one.sites) for one in series] == [(2, 30), (3, 30), (1, 30)]
    for one in series:
        assert one.looseness is not None
        assert one.looseness.least == pytest.approx(3)
        assert one.looseness.largest == pytest.approx(3)
        assert [at.kept for at in one.curve] == [0.5, 0.75]
        assert one.violated == ()
        assert bound_chart(one).count("<circle") == 60


def test_a_bound_that_holds_is_not_called_a_bug(samples):
    analysis = samples.analysis()
    outcome = samples.outcome(analysis)
    assert violations(outcome) == ()
    assert "bug" not in console_text(analysis, outcome).replace("would be a bug", "")
    assert "Please report it" not in to_html(analysis, outcome)


@pytest.mark.parametrize(
    "changed",
    [
        {"relative_error": 0.2, "bound": 0.1999},
        {"curve": (BoundPoint(20, 0.3, 0.2),)},
        {"relative_error": float("nan"), "bound": 0.2},
    ],
    ids=["chosen rank", "a rank of the curve", "no number"],
)
def test_a_planted_violation_is_flagged_as_a_bug_everywhere(samples, changed):
    analysis = samples.analysis()
    outcome = planted(samples.outcome(analysis), 4, **changed)
    name = outcome.sites[4].id
    assert violations(outcome) == (name,)
    for text in (console_text(analysis, outcome), to_html(analysis, outcome)):
        assert "which is a bug of this tool" in text
        assert name in text
    if changed.get("relative_error") == 0.2:
        report = to_json(analysis, outcome)
        assert [site["bound_holds"] for site in report["sites"]].count(False) == 1
        assert violations(from_json(report)[1]) == (name,)


def test_rounding_is_no_violation():
    assert is_within(0.1 + 1e-12, 0.1)
    assert is_within(1e-13, 0.0)
    assert not is_within(0.1001, 0.1)
    assert not is_within(float("nan"), 1.0)


def test_sites_without_a_bound_are_not_spoken_of(samples):
    analysis = samples.analysis(layers=2)
    outcome = samples.outcome(analysis)
    bare = replace(outcome, sites=tuple(replace(site, bound=None, curve=()) for site in outcome.sites))
    assert all(site.bound_holds is None for site in bare.sites)
    assert bound_series(analysis, bare) == ()
    assert "Error and bound" not in console_text(analysis, bare)
    assert "Error and bound" not in to_html(analysis, bare)
