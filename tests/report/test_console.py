import io
import re

import pytest
from rich.console import Console

from modegpt_graph.match.sites import Analysis, ModelFacts, Unmatched
from modegpt_graph.report.console import render_analysis, render_outcome


def drawn(render, width: int, terminal: bool = False) -> str:
    file = io.StringIO()
    render(
        Console(file=file, width=width, force_terminal=terminal, highlight=False, _environ={"TERM": "xterm-256color"})
    )
    return file.getvalue()


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("width", [80, 120, 160])
def test_an_analysis_that_is_piped_has_every_essential_and_no_escape(samples, width):
    text = drawn(lambda console: render_analysis(samples.analysis(), console), width)
    assert "\x1b" not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in (
        *("demo", "LlamaForCausalLM", "134.5 M", "106.2 M", "90 sites", "100 %", "0-29"),
        *("query / key", "value / output", "gate, up / down", "II", "III", "blocks of 2", "linear", "columns"),
        *("CR", "SVD", "Nyström", "nothing", "silu, mul", "proved and probed", "2e-16"),
        *("3 groups of 64 features", "pairs are kept or dropped."),
        "modegpt-graph compress demo --ratio 0.3 --out small",
    ):
        assert word in flat(text), word


def test_thirty_equal_layers_take_no_more_lines_than_one(samples):
    one, thirty = (
        drawn(lambda console, layers=layers: render_analysis(samples.analysis(layers), console), 100)
        for layers in (1, 30)
    )
    assert len(thirty.splitlines()) == len(one.splitlines())


@pytest.mark.parametrize("width", [80, 120])
def test_what_was_refused_or_left_alone_is_told_with_its_reason(samples, width):
    text = flat(drawn(lambda console: render_analysis(samples.normed(), console), width))
    assert "…" not in text
    assert "99.9 %" in text
    assert "21 of them cannot be made smaller" in text
    assert "left alone" in text
    assert "refuted by the probe (error 0.81)" in text
    assert "model.layers.{1-27}.mlp.router.weight 27 matrices" in text
    assert "nearest pattern gated-mlp:" in text


def test_a_model_in_which_nothing_was_found_is_told_so(samples):
    left = (Unmatched("w", None, "nothing like it"),)
    empty = Analysis(ModelFacts("odd", "Odd", 10, 10), (), left, 0.0)
    text = flat(drawn(lambda console: render_analysis(empty, console), 80))
    assert "0 %" in text
    assert "Nothing like it." in text
    assert "No site can be made smaller" in text
    assert "compress" not in text


def test_names_are_text_and_never_markup(samples):
    name = "[bold red]x[/] [link=http://e.x]y[/link]"
    text = drawn(lambda console: render_analysis(samples.analysis(1, name=name), console), 120)
    assert text.count(name) == 2  # in the title and in the next command
    text = drawn(
        lambda console: render_analysis(samples.analysis(1, sites=(samples.mlp(0, reason="[/] odd [red]"),)), console),
        90,
    )
    assert "[/] odd [red]." in text


def test_the_next_command_can_be_pasted_whatever_the_name(samples):
    text = drawn(lambda console: render_analysis(samples.analysis(1, name="my model; rm"), console), 80)
    assert "modegpt-graph compress 'my model; rm' --ratio 0.3 --out small" in text


@pytest.mark.parametrize("width", [80, 120, 160])
def test_an_outcome_compares_dense_and_compressed(samples, width):
    analysis = samples.analysis()
    text = drawn(lambda console: render_outcome(analysis, samples.outcome(analysis), console), width)
    assert "\x1b" not in text
    assert "…" not in text
    text = flat(text)
    for row in (
        "parameters 134.5 M 102.6 M −23.7 %",
        "bytes on disk 538.1 MB 410.5 MB −23.7 %",
        "key/value cache per token 46.1 kB 33.1 kB −28.1 %",
        "perplexity 17.79 35.38 ×1.99",
        "KL from dense, nats per token 0 0.7123",
        "30.0 % of the decoder layers' matrices (30.0 % asked)",
        "10 windows of 2,048 of wikitext2 (test)",
        "2 min 45 s in all; in seconds: calibrate 61",
        "1.7 plain forward passes",
        "691-1,434 of 1,536",
    ):
        assert row in text, row


def test_ranks_are_drawn_a_mark_a_layer_and_neighbours_share_one_where_there_is_no_room(samples):
    analysis = samples.analysis(layers=30)
    wide = drawn(lambda console: render_outcome(analysis, samples.outcome(analysis), console), 100)
    assert sorted(len(marks) for marks in re.findall("[▁▂▃▄▅▆▇█]{4,}", wide)) == [30, 30, 30]
    many = samples.analysis(layers=126)
    narrow = drawn(lambda console: render_outcome(many, samples.outcome(many), console), 80)
    assert sorted(len(marks) for marks in re.findall("[▁▂▃▄▅▆▇█]{4,}", narrow)) == [42, 42, 42]
    assert "one mark for 3 layers" in narrow


def test_what_was_not_measured_is_not_drawn_and_a_fallback_is(samples):
    analysis = samples.analysis(2)
    unmeasured = {"perplexity_dense": None, "perplexity_compressed": None, "kl": None, "evaluation": None}
    outcome = samples.outcome(analysis, fallback_reason="the hub did not answer", **unmeasured)
    text = flat(drawn(lambda console: render_outcome(analysis, outcome, console), 80))
    assert "perplexity" not in text
    assert "KL" not in text
    assert "not the text asked for: the hub did not answer" in text


def test_a_terminal_gets_colour_from_its_own_palette_only(samples):
    text = drawn(lambda console: render_analysis(samples.normed(), console), 100, terminal=True)
    codes = {code for group in re.findall(r"\x1b\[([\d;]*)m", text) for code in group.split(";")}
    assert codes
    # White, black and fixed colours would vanish on one background or the other.
    assert not codes & {"30", "37", "38", "40", "47", "48", "90", "97"}


@pytest.mark.parametrize("width", [80, 120])
def test_all_four_reductions_and_how_the_ratio_was_found_are_told(samples, width):
    analysis = samples.analysis()
    outcome = samples.outcome(analysis, search=samples.SEARCH)
    text = flat(drawn(lambda console: render_outcome(analysis, outcome, console), width))
    for said in (
        "30.0 % of the decoder layers' matrices (30.0 % found)",
        "in decoder-layer matrices 106.2 M 74.3 M −30.0 %",
        "multiply-adds per token, 2,048 attended to 205.2 M 150.0 M −26.9 %",
        "key/value cache per token 46.1 kB 33.1 kB −28.1 %",
        "+95.0 % predicted, +98.9 % measured on held-out windows; 2 ratios were tried.",
        "from an earlier run, which took 61 s for it.",
    ):
        assert said in re.sub(r"│\s*", "", text), said
