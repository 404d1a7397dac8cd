"""A comparison says on every medium what was asked, what was achieved, and why a figure is missing."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from modegpt_graph.match.sites import ModelFacts
from modegpt_graph.methods.race import Entry
from modegpt_graph.report.compare import Comparison, comparison_json
from modegpt_graph.report.compare_chart import comparison_chart
from modegpt_graph.report.compare_console import render_comparison
from modegpt_graph.report.compare_html import comparison_html
from modegpt_graph.report.files import json_text


@pytest.fixture
def comparison() -> Comparison:
    entries = (
        Entry("ours", 0.2, 0.2001, 21.3, None, 1.0),
        Entry("ours", 0.4, 0.4, 30.7, None, 1.0),
        Entry("shortgpt", 0.2, 0.233, 40.6, None, 0.1),
        Entry("shortgpt", 0.4, 0.4, 512.0, None, 0.1),
        Entry("svd", 0.2, 0.2, math.inf, None, 2.0),
        Entry("svd", 0.4, None, None, "factors of rank 1 give 0.39", 2.0),
        Entry("slicegpt", 0.2, None, None, "norm <b> is read by `x`", 0.0),
        Entry("slicegpt", 0.4, None, None, "norm <b> is read by `x`", 0.0),
    )
    return Comparison(
        ModelFacts("me/[bold]model", "Decoder", 134_515_008, 106_168_320),
        "32 windows of 1,024 tokens of valid.txt",
        "10 windows of 2,048 tokens of test.txt",
        0,
        17.79,
        entries,
        None,
        {"calibrate": 80.0},
    )


def console_text(comparison: Comparison, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    render_comparison(comparison, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_console_tells_figures_ratios_and_reasons(comparison: Comparison) -> None:
    text = console_text(comparison)
    assert re.search(r"ours +21\.30 +30\.70", text)
    assert "at 23.3 %" in text  # farther than half a percentage point from what was asked
    assert "at 20.0 %" not in text
    assert text.count("not available") == 3
    assert "Norm <b> is read by `x`." in text
    assert "At 40%: factors of rank 1 give 0.39." in text
    assert "me/[bold]model" in text
    assert "arXiv 2403.03853" in text


def test_the_chart_of_bars_is_least_loss_first(comparison: Comparison) -> None:
    bars = [line.split() for line in console_text(comparison).splitlines() if "█" in line]
    assert [bar[0] for bar in bars] == ["ours", "shortgpt"]
    assert bars[0][2] == f"{math.log(30.7 / 17.79):+.3f}"


def test_the_page_has_a_curve_for_each_method_that_was_measured(comparison: Comparison) -> None:
    page = comparison_html(comparison)
    assert page.count("<path ") == 2
    assert page.count("<circle ") == 4
    assert "shortgpt: 40.60 at 23.3 %" in page
    assert '<b class="good">21.30</b>' in page
    assert "norm &lt;b&gt; is read by <code>x</code>." in page
    for forbidden in ("http://", "https://", "<script", "url("):
        assert forbidden not in page


def test_higher_perplexity_is_higher_in_the_chart_and_names_do_not_overlap(comparison: Comparison) -> None:
    chart = comparison_chart(comparison)
    heights = [float(found) for found in re.findall(r'cy="([\d.]+)"', chart)]
    assert heights[0] > heights[1]
    assert heights[0] > heights[2]
    names = sorted(float(found) for found in re.findall(r'class="name" x="\d+" y="([\d.]+)"', chart))
    assert names[1] - names[0] >= 13


def test_the_json_is_whole_and_has_no_infinity(comparison: Comparison) -> None:
    plain = json.loads(json_text(comparison_json(comparison)))
    assert [one["perplexity"] for one in plain["results"]] == [21.3, 30.7, 40.6, 512.0, None, None, None, None]
    assert plain["results"][4]["reason"] == "the perplexity is beyond a float"
    assert plain["results"][4]["achieved"] == 0.2
    assert plain["methods"]["svd"]["source"].startswith("arXiv")
    assert plain["model"]["decoder_linear_parameters"] == 106_168_320


def test_nothing_measured_draws_no_chart(comparison: Comparison) -> None:
    entries = tuple(entry for entry in comparison.entries if entry.method == "slicegpt")
    empty = Comparison(comparison.model, "", "", 0, 17.79, entries, None, {})
    assert comparison_chart(empty) == ""
    assert "<svg" not in comparison_html(empty)
    assert "█" not in console_text(empty)
