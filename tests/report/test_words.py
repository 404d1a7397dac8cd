import math

import pytest

from modegpt_graph.match.sites import Certificate
from modegpt_graph.report import words


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (576, "576"), (9_999, "9,999"), (49_152, "49.2 k"), (134_515_008, "134.5 M"), (6_738_415_616, "6.74 B")],
)
def test_count(number, text):
    assert words.count(number) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.99999, "99.9 %"), (0.00001, "0.1 %"), (0.3, "30.0 %"), (1.5, "150.0 %")],
)
def test_nearly_all_is_never_all(share, text):
    assert words.percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (17.79, "17.79"),
        (0.0, "0.000"),
        (3.2e-7, "3.2e-07"),
        (123456.0, "1.2e+05"),
        (math.inf, "not finite"),
        (1234.0, "1234"),
    ],
)
def test_figure(value, text):
    assert words.figure(value) == text


@pytest.mark.parametrize(
    ("certificate", "text"),
    [
        (Certificate("both", 2.2e-16, True), "proved and probed (error 2e-16)"),
        (Certificate("structural", None, True), "proved, not probed"),
        (Certificate("probed", 0.0, True), "probed, not proven (error 0)"),
        (Certificate("both", 0.81, False), "refuted by the probe (error 0.81)"),
        (Certificate("structural", None, False), "refuted by what the operations do"),
    ],
)
def test_certificate_line(certificate, text):
    assert words.certificate_line(certificate) == text


def test_sentences_begin_and_end_as_sentences_but_identifiers_stay():
    assert words.sentence("nothing stands between") == "Nothing stands between."
    assert words.sentence("rms_norm couples all") == "rms_norm couples all."
    assert words.sentence("Really?") == "Really?"
    assert words.sentence("wikitext2", start=False) == "wikitext2."
    assert words.sentence("") == ""
