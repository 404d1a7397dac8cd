import re
from html.parser import HTMLParser

import pytest

from modegpt_graph.report.html import to_html

VOID = {"meta"}


class Reader(HTMLParser):
    """Text, tags and attributes; fails on tags that are not closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.attributes, self.words, self.tags = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.mark.parametrize("with_outcome", [False, True])
def test_the_file_needs_nothing_else(samples, with_outcome):
    analysis = samples.normed(4)
    page = to_html(analysis, samples.outcome(analysis) if with_outcome else None)
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(reader.tags)
    assert not {"src", "href", "srcset", "style"} & {name for name, _ in reader.attributes}
    for forbidden in ("http://", "https://", "//fonts", "@import", "url("):
        assert forbidden not in page
    assert "prefers-color-scheme: dark" in page


def test_it_says_what_the_console_says(samples):
    text = Reader(to_html(samples.normed())).text
    for words in (
        *(
            "Qwen/Qwen3-30B-A3B",
            "Qwen3MoeForCausalLM",
            "30.5 B",
            "29.9 B",
            "168",
            "99.9 %",
            "21 cannot be made smaller",
        ),
        *("blocks of 2", "left alone", "Nyström", "SVD", "Refuted by the probe (error 0.81)."),
        "Rotary embedding turns features in pairs (i, i + 32), so whole pairs are kept or dropped.",
        *("model.layers.{1-27}.mlp.router.weight", "gated-mlp", "commutant", "certificate"),
    ):
        assert words in text, words


def test_every_layer_is_there_to_be_unfolded(samples):
    analysis = samples.analysis(layers=5)
    page = to_html(analysis, samples.outcome(analysis))
    assert page.count('<details class="site">') == 3
    for layer in range(5):
        assert f"model.layers.{layer}.mlp.gate_proj.weight" in page
    assert "rows 0-575" in page
    assert "691 of 1,536" in page


def test_ranks_are_a_chart_with_a_bar_for_each_layer(samples):
    analysis = samples.analysis(layers=7)
    page = to_html(analysis, samples.outcome(analysis))
    assert page.count('<svg class="ranks"') == 3
    assert page.count('class="kept"') == 21
    assert "layer 3: 768 of 1,536 kept (50%), relative error 0.06250" in page
    assert "<svg" not in to_html(analysis)


def test_odd_names_are_shown_and_never_run(samples):
    name = "<script>alert(1)</script>\"&'<img src=x onerror=y>"
    sites = (samples.mlp(0, reason=name, pattern=name, variant=name, between=(name,)),)
    page = to_html(samples.analysis(1, name=name, sites=sites), samples.outcome(samples.analysis(0)))
    reader = Reader(page)
    assert "script" not in reader.tags
    assert "img" not in reader.tags
    assert reader.text.count("<script>alert(1)</script>") >= 5


def test_a_fallback_is_told(samples):
    analysis = samples.analysis(1)
    page = to_html(analysis, samples.outcome(analysis, fallback_reason="the hub did not answer in 5 seconds"))
    assert "Not the text asked for: the hub did not answer in 5 seconds." in Reader(page).text
