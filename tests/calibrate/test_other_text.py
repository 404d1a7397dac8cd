from functools import partial
from itertools import pairwise

import pytest
import torch
from fixtures import library
from fixtures.families import family, tokens
from fixtures.tokenizer import Numbers
from torch import nn

import modegpt_graph as mg
from modegpt_graph.calibrate.general import general_ids
from modegpt_graph.calibrate.observe import calibrate
from modegpt_graph.calibrate.sampling import ANY, own_windows, sample_windows
from modegpt_graph.calibrate.statistics import ExpertStatistics, ScoreStatistics
from modegpt_graph.calibrate.text import Calibration, calibration_windows
from modegpt_graph.evaluate import compare
from modegpt_graph.match.decoder import decoder_layers
from modegpt_graph.match.prepare import read_patterns, survey_model
from modegpt_graph.models import resolve


class Plain(nn.Module):
    """A model without `generate` and cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_cache_changes_nothing_of_what_is_written(name):
    model = family(name)
    written = sample_windows(model, 8, 12, start=(3,))
    assert torch.equal(written, sample_windows(Plain(model), 8, 12, start=(3,)))


def test_windows_begin_as_they_are_told():
    model = family("llama")
    assert sample_windows(model, 8, 3, start=(5, 6))[:, :2].tolist() == 8 * [[5, 6]]
    assert len(set(sample_windows(model, 64, 3, start=ANY)[:, 0].tolist())) > 8


def test_every_other_window_is_likelier():
    model = family("llama")
    written = sample_windows(model, 64, 32, start=ANY, temperatures=(1.0, 0.05))
    logits = model(written).logits[:, :-1].log_softmax(-1)
    own = logits.gather(2, written[:, 1:, None]).mean(dim=(1, 2))
    assert own[1::2].min() > own[::2].max()


def test_no_text_ends(monkeypatch):
    model, end = family("llama"), 9
    free = sample_windows(model, 64, 128, start=(5,), temperatures=(1.0, 1.5))
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    written = sample_windows(model, 64, 128, start=(5,), temperatures=(1.0, 1.5))
    assert (free == end).any()
    assert not (written == end).any()


class Characters:
    """A tokenizer of single characters, below 60; those in `unknown` are none of its own."""

    all_special_ids, unk_token_id = (7, 8), 3

    def __init__(self, unknown="", shift=10):
        self.unknown, self.shift = unknown, shift

    def __call__(self, text, verbose=True):
        return {"input_ids": [7, 8, *(3 if one in self.unknown else self.shift + ord(one) % 50 for one in text)]}


@pytest.fixture(params=[128, 64])
def text(request, tmp_path):
    """A function of a tokenizer: calibration text of 4,096 tokens."""
    (tmp_path / "text.txt").write_text(" ".join(str(number % 90) for number in range(8000)))
    window = request.param
    return lambda tokenizer: calibration_windows(
        tmp_path / "text.txt", tokenizer, windows=4096 // window, window=window
    )


def test_general_text_begins_as_the_tokenizer_begins_a_text(text):
    read = text(Characters())
    other, window = read.with_other(family("llama"), 0.5, seed=1).other, read.tokens.shape[1]
    assert other.shape == (2048 // window, window)
    assert other[:, :2].unique(dim=0).tolist() == [[7, 8]]


def test_general_text_is_taken_from_all_over_it(text):
    ids, read = general_ids(Characters(), 60), text(Characters())
    other, size = read.with_other(family("llama"), 0.5, seed=1).other, read.tokens.shape[1] - 2
    cut = ids[2 : 2 + len(ids[2:]) // size * size].view(-1, size).tolist()
    places = [cut.index(row) for row in other[:, 2:].tolist()]
    steps = [after - before for before, after in pairwise(places)]
    assert (places[0], places[-1]) == (0, len(cut) - 1)
    assert max(steps) - min(steps) <= 1


def test_no_more_general_text_than_there_is(text):
    read = text(Characters())
    other = read.with_other(family("llama"), 1e6, seed=1).other
    assert other.numel() <= len(general_ids(Characters(), 60)) * read.tokens.shape[1] / (read.tokens.shape[1] - 2)
    assert len(other.unique(dim=0)) == len(other)


@pytest.mark.parametrize("tokenizer", [Characters(unknown="e"), Characters(shift=300), Numbers((7, 8)), Numbers()])
def test_where_it_cannot_be_read_the_model_samples_a_little(text, tokenizer):
    """A tokenizer that does not know a common letter; one with tokens that the model has not; two that fail."""
    read = text(tokenizer)
    other = read.with_other(family("llama"), 2.0, seed=1)
    assert other.other.numel() == pytest.approx(0.8 * 4096, abs=128)
    assert other.description.endswith("that the model samples")
    starts = other.other[:, :2].unique(dim=0)
    assert starts.tolist() == [[7, 8]] if tokenizer.all_special_ids else len(starts) > 4


@pytest.mark.parametrize(
    ("windows", "window", "share", "expected"),
    [
        (32, 1024, 0.5, (32, 512)),
        (4, 1024, 0.5, (8, 256)),
        (2, 1024, 0.5, (8, 128)),
        (1, 1024, 0.5, None),
        (128, 256, 0.5, (64, 256)),
        (16, 64, 0.5, (8, 64)),
    ],
)
def test_general_text_comes_in_long_windows_where_there_is_enough(windows, window, share, expected):
    read = Calibration(tokens(windows, window, vocabulary=60), "token ids", tokenizer=Characters())
    other = read.with_other(family("llama"), share, seed=1).other
    assert (other if other is None else tuple(other.shape)) == expected


def test_text_that_the_model_sampled_gets_general_text_beside_or_none():
    asked = {"model": family("llama"), "windows": 32, "window": 128}
    for tokenizer, has_other in ((Characters(), True), (None, False)):
        read = calibration_windows("self", tokenizer, **asked).with_other(family("llama"), 0.5, seed=1)
        assert (read.other is not None) == has_other


class Table(nn.Module):
    """A model whose embedding is no module."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(60, 4))

    def forward(self, tokens):
        return self.table[tokens] @ self.table.T


def test_general_text_is_read_by_a_model_without_an_embedding_module(text):
    assert text(Characters()).with_other(Table(), 0.5, seed=1).other.numel() == 2048


def test_none_where_they_are_few_or_dear(text):
    read = text(Characters())
    assert read.with_other(family("llama"), 7.9 * read.tokens.shape[1] / 4096, seed=1) is read
    assert own_windows(family("llama"), 8, 16, seed=1).shape == (8, 16)
    assert own_windows(Plain(family("llama")), 8, 16, seed=1) is None


@pytest.mark.parametrize("value_inputs", [False, True])
@pytest.mark.parametrize("build", [lambda: family("llama"), lambda: library.build("mixtral", "cpu")])
def test_statistics_of_two_texts_are_those_of_both(build, value_inputs):
    model, first, second = build(), tokens(3, 16, seed=1), tokens(5, 16, seed=2)
    surveyed = survey_model(resolve(model), read_patterns())
    modules, layers = surveyed.modules(), decoder_layers(surveyed.trace)
    run = partial(calibrate, model, modules, layers, value_inputs=value_inputs)
    other = run(second)
    site = next(iter(other.statistics))
    found = run(first).with_other(other, [site])
    assert found.other == {site: other.statistics[site]}
    whole = run(torch.cat([first, second]))
    assert found.tokens == whole.tokens
    torch.testing.assert_close(found.importance, whole.importance)
    for site, expected in whole.statistics.items():
        one = found.statistics[site]
        if isinstance(expected, ScoreStatistics):
            pairs = [(one.queries, expected.queries), (one.keys, expected.keys)]
        elif isinstance(expected, ExpertStatistics):
            pairs = list(zip(one.grams, expected.grams, strict=True))
        else:
            pairs = [(getattr(one, name), sums) for name, sums in vars(expected).items()]
        for sums, wanted in pairs:
            torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def narrow():
    """Text of four of the model's tokens."""
    return tokens(64, 128, vocabulary=5)


def test_other_texts_suffer_less(narrow):
    model = family("llama")
    asked = {"calibration": narrow, "evaluate": False, "recalibrate": False, "cache": False, "allocator": "uniform"}
    written = sample_windows(model, 32, 32, seed=5)
    losses = [
        compare(model, mg.compress(model, 0.4, other_text=other, **asked).model, written).kl for other in (True, False)
    ]
    assert losses[0] < 0.9 * losses[1]


def test_the_report_says_so(narrow):
    said = {}
    for asked in ({}, {"other_text": False}, {"preset": "paper"}):
        result = mg.compress(family("llama"), 0.3, calibration=narrow, evaluate=False, cache=False, **asked)
        said[str(asked)] = result.report.to_json()["compression"]["calibration"]
    with_other, without, paper = said.values()
    assert with_other == "token ids as given, 64 windows of 128 tokens; 12 windows of 128 tokens that the model samples"
    assert without == paper == "token ids as given, 64 windows of 128 tokens"
