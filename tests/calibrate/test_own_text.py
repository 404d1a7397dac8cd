import pytest
import torch
from fixtures import library
from fixtures.families import family, tokens
from fixtures.tokenizer import Numbers
from torch import nn

import modegpt_graph as mg
from modegpt_graph.calibrate.observe import calibrate
from modegpt_graph.calibrate.sampling import ANY, own_windows, sample_windows
from modegpt_graph.calibrate.statistics import ExpertStatistics, ScoreStatistics
from modegpt_graph.calibrate.text import calibration_windows
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
    begun = sample_windows(model, 8, 9, start=(5, 6, 8), turn=(3,))
    assert begun[::2, :3].tolist() == 4 * [[5, 6, 8]]
    assert set(begun[1::2, 0].tolist()) == {3}
    assert not (begun[1::2, 1] == 6).all()
    assert len(set(sample_windows(model, 64, 3, start=ANY)[:, 0].tolist())) > 8


def test_every_other_window_is_likelier():
    model = family("llama")
    written = sample_windows(model, 64, 32, start=ANY, temperatures=(1.0, 0.05))
    logits = model(written).logits[:, :-1].log_softmax(-1)
    own = logits.gather(2, written[:, 1:, None]).mean(dim=(1, 2))
    assert own[1::2].min() > own[::2].max()


def test_own_text_begins_as_the_tokenizer_begins_a_text(tmp_path):
    """A tokenizer that puts its own tokens before a text; one that puts none."""
    (tmp_path / "text.txt").write_text(" ".join(str(number % 90) for number in range(8000)))
    starts = {}
    for special in ((7, 8), ()):
        tokenizer = Numbers(special)
        text = calibration_windows(tmp_path / "text.txt", tokenizer, windows=32, window=128)
        starts[special] = text.with_own(family("llama"), 0.5, seed=1).own[:, :2]
    assert starts[7, 8].unique(dim=0).tolist() == [[7, 8]]
    assert len(starts[()][:, 0].unique()) > 4


class Chat(Numbers):
    """A tokenizer with a template: a turn begins with these numbers."""

    def __init__(self, turn):
        super().__init__((7,))
        self.turn = turn

    def __call__(self, text, verbose=True, add_special_tokens=True):
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": ids if add_special_tokens else ids[1:]}

    def apply_chat_template(self, conversation, tokenize=True):
        assert not tokenize
        if self.turn is None:
            raise ValueError("a template that asks for more than one turn")
        return "".join(f"{' '.join(map(str, self.turn))} {one['content']}" for one in conversation)


@pytest.mark.parametrize("turn", [(11, 12, 13), tuple(range(65)), None])
def test_half_of_the_own_text_of_a_chat_model_begins_as_a_turn(tmp_path, turn):
    """But where turns begin with more than half of a window, or the template fails."""
    (tmp_path / "text.txt").write_text(" ".join(str(number % 90) for number in range(8000)))
    text = calibration_windows(tmp_path / "text.txt", Chat(turn), windows=32, window=128)
    both = text.with_own(family("llama"), 0.5, seed=1)
    own = both.own
    begun = (own[:, :3] == torch.tensor([11, 12, 13])).all(1)
    assert begun.tolist() == [turn == (11, 12, 13) and row % 4 >= 2 for row in range(len(own))]
    assert set(own[~begun, 0].tolist()) == {7}
    assert ("half of them from where a user speaks" in both.description) == begun.any()


def test_only_a_turn_ends(monkeypatch):
    model, end = family("llama"), 9
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    written = sample_windows(model, 64, 128, start=(5,), temperatures=(1.0, 1.5), turn=(3, 4))
    ends = (written == end).any(1)
    assert not ends[torch.arange(64) // 2 % 2 == 0].any()
    assert ends.any()


def test_as_many_tokens_as_their_share():
    text = tokens(16, 128)
    assert own_windows(family("llama"), text, 0.5, seed=1).shape == (8, 128)


def test_none_where_they_are_few_or_dear():
    assert own_windows(family("llama"), tokens(16, 128), 0.25, seed=1) is None
    assert own_windows(Plain(family("llama")), tokens(64, 128), 0.5, seed=1) is None


@pytest.mark.parametrize("build", [lambda: family("llama"), lambda: library.build("mixtral", "cpu")])
def test_statistics_of_two_texts_are_those_of_both(build):
    model, first, second = build(), tokens(3, 16, seed=1), tokens(5, 16, seed=2)
    surveyed = survey_model(resolve(model), read_patterns())
    modules, layers = surveyed.modules(), decoder_layers(surveyed.trace)
    own = calibrate(model, modules, layers, second)
    site = next(iter(own.statistics))
    found = calibrate(model, modules, layers, first).with_own(own, [site])
    assert found.own == {site: own.statistics[site]}
    whole = calibrate(model, modules, layers, torch.cat([first, second]))
    assert found.tokens == whole.tokens
    torch.testing.assert_close(found.importance, whole.importance)
    for site, expected in whole.statistics.items():
        one = found.statistics[site]
        if isinstance(expected, ScoreStatistics):
            pairs = [(one.queries, expected.queries), (one.keys, expected.keys)]
        elif isinstance(expected, ExpertStatistics):
            pairs = list(zip(one.grams, expected.grams, strict=True))
        else:
            pairs = [(one.gram, expected.gram)]
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
    losses = [compare(model, mg.compress(model, 0.4, own_text=own, **asked).model, written).kl for own in (True, False)]
    assert losses[0] < 0.9 * losses[1]


def test_the_report_says_so(narrow):
    said = {}
    for asked in ({}, {"own_text": False}, {"preset": "paper"}):
        result = mg.compress(family("llama"), 0.3, calibration=narrow, evaluate=False, cache=False, **asked)
        said[str(asked)] = result.report.to_json()["compression"]["calibration"]
    with_own, without, paper = said.values()
    assert with_own == "token ids as given, 64 windows of 128 tokens; 9 windows of 128 tokens that the model samples"
    assert without == paper == "token ids as given, 64 windows of 128 tokens"
