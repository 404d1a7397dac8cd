import json

import pytest
import torch
from fixtures.tokenizer import Numbers
from torch import nn

from modegpt_graph.calibrate.sampling import sample_windows
from modegpt_graph.calibrate.sources import read_text
from modegpt_graph.calibrate.text import calibration_windows, evaluation_windows
from modegpt_graph.errors import InputError, ModegptError
from modegpt_graph.models import HubUnreachable


class Bigram(nn.Module):
    """A plain decoder without `generate`: the logits of what follows each token are a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens):
        return self.table[tokens]


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def numbers(tmp_path):
    """A text of 10,000 tokens, 0 to 9,999."""
    file = tmp_path / "numbers.txt"
    file.write_text(" ".join(map(str, range(10_000))))
    return file


class TestReadText:
    def test_plain_text_is_taken_as_it_is(self, tmp_path):
        text = " a \n\n= b =\n\n\n c <unk> é\n"
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert read_text(tmp_path / "a.txt") == text

    def test_records_are_joined_in_their_own_order(self, tmp_path):
        records = [
            {"instruction": "Add.", "input": "", "output": "3"},
            {"instruction": "Sing.", "input": "softly", "output": "La"},
        ]
        (tmp_path / "a.json").write_text(json.dumps(records))
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
        assert read_text(tmp_path / "a.json") == "Add.\n3\n\nSing.\nsoftly\nLa"
        assert read_text(tmp_path / "a.jsonl") == read_text(tmp_path / "a.json")

    def test_a_text_field_stands_alone(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(json.dumps({"url": "https://x", "text": "words", "year": 3}))
        assert read_text(tmp_path / "a.jsonl") == "words"

    def test_a_conversation_is_its_turns(self, tmp_path):
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
        (tmp_path / "a.jsonl").write_text(json.dumps({"id": "7", "messages": turns}))
        assert read_text(tmp_path / "a.jsonl").endswith("Hello\nGood day")

    def test_parquet(self, tmp_path):
        import datasets

        datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
        assert read_text(tmp_path / "a.parquet") == "one\n\ntwo"

    @pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl"])
    def test_empty_file(self, tmp_path, suffix):
        (tmp_path / f"a{suffix}").touch()
        with pytest.raises(InputError, match="holds no text"):
            read_text(tmp_path / f"a{suffix}")

    def test_records_without_strings(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"year": 3}')
        with pytest.raises(InputError, match="holds no text"):
            read_text(tmp_path / "a.jsonl")

    @pytest.mark.parametrize(("suffix", "content"), [(".txt", b"\xff\xfe\xff"), (".jsonl", b"{"), (".parquet", b"x")])
    def test_broken_file(self, tmp_path, suffix, content):
        file = tmp_path / f"a{suffix}"
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"cannot be read as {suffix}") as caught:
            read_text(file)
        assert "\n" not in str(caught.value)

    def test_missing_file(self):
        with pytest.raises(InputError, match=r"there is no text file missing\.txt"):
            read_text("missing.txt")

    def test_unknown_name(self):
        with pytest.raises(InputError, match=r"did you mean wikitext2\?"):
            read_text("wikitext")

    def test_hub_out_of_reach(self, no_hub):
        with pytest.raises(HubUnreachable, match=r"wikitext2 .* out of reach"):
            read_text("wikitext2")

    def test_in_offline_mode_only_the_cache_is_asked(self, no_hub, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(HubUnreachable, match="alpaca could not be fetched"):
            read_text("alpaca")

    def test_no_held_out_split(self):
        with pytest.raises(InputError, match="alpaca has no held-out split"):
            read_text("alpaca", "evaluation")


class TestCalibrationWindows:
    def test_windows_are_consecutive_tokens_that_do_not_overlap(self, numbers):
        tokens = calibration_windows(numbers, Numbers(), windows=20, window=300).tokens
        assert tokens.shape == (20, 300)
        assert tokens.dtype == torch.int64
        assert (tokens.diff(dim=1) == 1).all()
        assert tokens.unique().numel() == tokens.numel()
        assert (tokens[:, 0].diff() > 0).all()

    def test_the_choice_follows_the_seed(self, numbers):
        first, again, other = (
            calibration_windows(numbers, Numbers(), windows=5, window=200, seed=seed).tokens for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_every_window_begins_as_the_tokenizer_begins_a_text(self, numbers):
        begin = torch.tensor([50_000, 50_001])
        calibration = calibration_windows(numbers, Numbers(begin.tolist()), windows=20, window=300)
        tokens = calibration.tokens
        assert tokens.shape == (20, 300)
        assert (tokens[:, :2] == begin).all()
        assert (tokens[:, 2:].diff(dim=1) == 1).all()
        assert tokens[:, 2:].unique().numel() == 20 * 298

    def test_fewer_windows_than_asked_for_is_said(self, numbers):
        calibration = calibration_windows(numbers, Numbers(), windows=32, window=1024)
        assert calibration.tokens.shape == (9, 1024)
        assert calibration.description.endswith("9 windows of 1,024 tokens; 32 of 1,024 were asked for")
        assert calibration.fallback_reason is None

    def test_a_text_shorter_than_a_window_is_one_window(self, tmp_path):
        (tmp_path / "a.txt").write_text(" ".join(map(str, range(200))))
        assert torch.equal(calibration_windows(tmp_path / "a.txt", Numbers()).tokens, torch.arange(200).unsqueeze(0))

    def test_too_short(self, tmp_path):
        (tmp_path / "a.txt").write_text(" ".join(map(str, range(100))))
        with pytest.raises(InputError, match="has 100 tokens; calibration needs 128"):
            calibration_windows(tmp_path / "a.txt", Numbers())

    def test_windows_fit_the_models_positions(self, numbers, tiny):
        tokens = calibration_windows(numbers, Numbers(), windows=2, model=tiny()).tokens
        assert tokens.shape == (2, 256)

    def test_token_ids_are_taken_as_they_are(self):
        given = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
        tokens = calibration_windows(given, None).tokens
        assert torch.equal(tokens, given)
        assert tokens.dtype == torch.int64

    @pytest.mark.parametrize(
        "tokens", [torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)]
    )
    def test_wrong_token_ids(self, tokens):
        with pytest.raises(InputError, match="token ids must"):
            calibration_windows(tokens, None)

    def test_without_tokenizer(self, numbers):
        with pytest.raises(InputError, match="no tokenizer"):
            calibration_windows(numbers, None)

    def test_self_is_said_to_be_sampled(self, tiny):
        calibration = calibration_windows("self", None, model=tiny())
        assert "sampled from the model" in calibration.description
        assert calibration.tokens.shape == (64, 128)
        assert calibration.fallback_reason is None

    def test_self_needs_a_model(self):
        with pytest.raises(InputError, match="no model was given"):
            calibration_windows("self", None)

    def test_falls_back_on_self_where_the_hub_is_out_of_reach(self, no_hub, tiny):
        model = tiny()
        fallen = calibration_windows("wikitext2", None, model=model, seed=3)
        assert "wikitext2" in (fallen.fallback_reason or "")
        assert fallen.description.startswith("text sampled from the model itself")
        assert torch.equal(fallen.tokens, calibration_windows("self", None, model=model, seed=3).tokens)

    def test_without_a_model_there_is_no_fallback(self, no_hub):
        with pytest.raises(HubUnreachable):
            calibration_windows("wikitext2", Numbers())


class TestEvaluationWindows:
    def test_are_the_first_of_the_text(self, numbers):
        tokens = evaluation_windows(numbers, Numbers(), window=50, windows=3)
        assert torch.equal(tokens, torch.arange(150).view(3, 50))

    def test_all_whole_ones_by_default(self, numbers):
        assert evaluation_windows(numbers, Numbers()).shape == (4, 2048)

    def test_too_short(self, numbers):
        with pytest.raises(InputError, match="fewer than one window of 20,000"):
            evaluation_windows(numbers, Numbers(), window=20_000)

    def test_self_is_no_text_to_evaluate_on(self):
        with pytest.raises(InputError, match="self is text for calibration"):
            evaluation_windows("self", Numbers())

    def test_real_tokenizer_reads_a_long_text_without_a_warning(self, tmp_path, demo_tokenizer):
        (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 400)
        tokens = evaluation_windows(tmp_path / "a.txt", demo_tokenizer, window=64)
        assert demo_tokenizer.decode(tokens[0]).startswith("The quick brown fox jumps")


class TestSampleWindows:
    def test_follow_the_models_distribution(self):
        # Token 0 leads to 1 or 2 with odds 3 to 1, and both lead back to 0; token 3 never comes.
        never = -1e9
        table = torch.full((4, 4), never)
        table[0, 1], table[0, 2] = torch.tensor([0.75, 0.25]).log()
        table[1, 0] = table[2, 0] = 0.0
        tokens = sample_windows(Bigram(table), windows=400, window=9, start=(0,))
        assert (tokens[:, ::2] == 0).all()
        # 1,600 draws: the share's standard deviation is 0.011, and five of them are allowed.
        assert (tokens[:, 1::2] == 1).double().mean().item() == pytest.approx(0.75, abs=0.055)
        assert not (tokens == 3).any()

    def test_with_the_cache_follow_the_same_distribution(self, tiny):
        model = tiny(vocab_size=8, eos_token_id=None)
        model.lm_head.weight.mul_(5)
        tokens = sample_windows(model, windows=4000, window=3, start=(0,))
        distribution = model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
        # Every token has a share to lose, the repeated one too: settings that bend generation would take it.
        assert distribution.min() > 0.05
        assert distribution.max() < 0.4
        found = tokens[:, 1].bincount(minlength=8) / 4000
        # The standard deviation of a share is 0.008 at most.
        assert (found - distribution).abs().max() < 0.03
        after = tokens[tokens[:, 1] == 3, 2]
        following = model(torch.tensor([[0, 3]])).logits[0, -1].softmax(-1)
        assert (after.bincount(minlength=8) / len(after) - following).abs().max() < 4 * (0.25 / len(after)) ** 0.5

    def test_windows_are_full_and_start_with_the_models_own_token(self, tiny):
        tokens = sample_windows(tiny(), windows=6, window=40)
        assert tokens.shape == (6, 40)
        assert (tokens[:, 0] == 1).all()
        assert not (tokens == 2).any()

    def test_follow_the_seed_and_leave_the_global_generator_alone(self, tiny):
        model = tiny()
        state = torch.get_rng_state()
        first, again, other = (sample_windows(model, 4, 16, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_plain_module_starts_anywhere(self):
        tokens = sample_windows(Bigram(torch.zeros(50, 50)), windows=200, window=2)
        assert tokens[:, 0].unique().numel() > 30

    @pytest.mark.parametrize("plain", [True, False])
    def test_overflow_is_one_line(self, tiny, plain):
        model = Bigram(torch.full((4, 4), float("nan"))) if plain else tiny()
        next(model.parameters()).fill_(float("nan")) if not plain else None
        with pytest.raises(ModegptError, match="non-finite probabilities"):
            sample_windows(model, 2, 4, start=(0,))
