"""The façade on tiny models: what is promised of a compression, and what a person gets for bad input."""

import copy
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.families import family, shrunk, tokens
from torch import nn

import modegpt_graph as mg
from modegpt_graph import cli
from modegpt_graph.api import evaluate
from modegpt_graph.commands import runtime
from modegpt_graph.errors import InputError, ModegptError
from modegpt_graph.models import cache_of

SHARED = ["llama", "opt", "gemma", "phi", "gpt-neox", "gpt2"]


def decoder_matrices(model: Any) -> int:
    """Entries of the matrices within the repeated layers, counted without the package."""
    layers = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    return sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim == 2)


def removed(dense: Any, smaller: Any) -> float:
    return 1 - decoder_matrices(smaller) / decoder_matrices(dense)


def cached_bytes(model: Any, length: int) -> int:
    with torch.no_grad():
        cache = cache_of(model(tokens(1, length), use_cache=True))
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("name", SHARED)
def test_the_ratio_is_met_and_stated(name: str) -> None:
    one = shrunk(name)
    found = removed(one.dense, one.result.model)
    assert found == pytest.approx(0.4, abs=0.005)
    assert one.result.report.outcome is not None
    assert one.result.report.outcome.ratios.decoder_linear == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "ratio", "allocator"),
    [
        ("llama", 0.1, "block-influence"),
        ("opt", 0.2, "curves"),
        ("gemma", 0.3, "block-influence"),
        ("phi", 0.3, "curves"),
        ("gpt-neox", 0.5, "block-influence"),
        ("gpt2", 0.6, "curves"),
    ],
)
def test_the_ratio_is_met_by_every_allocator(name: str, ratio: float, allocator: str) -> None:
    model = family(name)
    result = mg.compress(model, ratio, calibration=tokens(), allocator=allocator, evaluate=False)
    assert removed(model, result.model) == pytest.approx(ratio, abs=0.005)
    assert result.report.outcome is not None
    assert result.report.outcome.allocator == allocator


@pytest.mark.parametrize("name", SHARED)
def test_matrices_files_and_the_cache_really_shrink(name: str) -> None:
    one, outcome = shrunk(name), shrunk(name).result.report.outcome
    assert outcome is not None
    before, after = (
        {key: value.nbytes for key, value in model.state_dict().items()} for model in (one.dense, one.result.model)
    )
    for site in outcome.sites:
        assert 0 < site.rank < site.full_rank
        assert site.parameters_after < site.parameters_before
    assert sum(after.values()) < 0.9 * sum(before.values())
    assert outcome.parameters_before - outcome.parameters_after == pytest.approx(
        sum(p.numel() for p in one.dense.parameters()) - sum(p.numel() for p in one.result.model.parameters())
    )
    assert outcome.bytes_before is not None
    assert outcome.bytes_after is not None
    assert outcome.bytes_after < outcome.bytes_before
    caches = [cached_bytes(model, 10) for model in (one.dense, one.result.model)]
    assert caches[1] < 0.75 * caches[0]
    assert [caches[0] / 10, caches[1] / 10] == [
        outcome.cache_bytes_per_token_before,
        outcome.cache_bytes_per_token_after,
    ]


@pytest.mark.parametrize("name", SHARED)
def test_with_and_without_the_cache_the_smaller_model_says_the_same(name: str) -> None:
    model: Any = shrunk(name).result.model
    ids = tokens(2, 9, seed=4)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padded on the left
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        cached = model.generate(ids, **arguments)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **arguments))
        alone = model.generate(ids[1:, 4:], **(arguments | {"attention_mask": mask[1:, 4:]}))
    assert torch.equal(cached[1, 4:], alone[0])


def test_the_model_given_is_left_as_it_was() -> None:
    model = family("llama")
    classes = {path: type(part) for path, part in model.named_modules()}
    names = {path: set(vars(part)) for path, part in model.named_modules()}
    kept, copied = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    result = mg.compress(model, 0.3, calibration=tokens(), evaluate=True)
    assert {path: type(part) for path, part in model.named_modules()} == classes
    assert {path: set(vars(part)) for path, part in model.named_modules()} == names
    assert all(value is kept[name] for name, value in model.named_parameters())
    assert all(torch.equal(value, copied[name]) for name, value in model.state_dict().items())
    hooks = [value for part in model.modules() for name, value in vars(part).items() if name.endswith("_hooks")]
    assert not any(hooks)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.model.parameters()}
    assert not shared, "writing to the smaller model would change the one given"


def test_the_same_seed_gives_the_same_model(tiny_folder: Path) -> None:
    first, again = (
        mg.compress(str(tiny_folder), 0.3, calibration="self", calibration_window=16, seed=3, evaluate=False)
        for _ in range(2)
    )
    one, same = first.model.state_dict(), again.model.state_dict()
    assert one.keys() == same.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_uniform_is_the_same_in_every_layer_but_for_what_rounding_takes() -> None:
    outcome = shrunk("llama").result.report.outcome
    assert outcome is not None
    first, second = ([site.rank for site in outcome.sites[start : start + 3]] for start in (0, 3))
    assert first[:2] == second[:2]
    assert abs(first[2] - second[2]) <= 2


def test_unknown_allocators_are_refused() -> None:
    with pytest.raises(InputError, match="unknown allocator 'fair'; known: "):
        mg.compress(family("llama"), 0.3, calibration=tokens(), allocator="fair")


def test_a_file_in_a_folder_with_a_tokenizer(text_folder: Path, tmp_path: Path) -> None:
    """Model and text by name: calibrated on part of the text, measured on windows that were held out of it."""
    text = write_text(tmp_path / "text.txt")
    result = mg.compress(str(text_folder), 0.3, calibration=text, calibration_windows=4, calibration_window=128)
    outcome = result.report.outcome
    assert outcome is not None
    assert outcome.calibration.startswith(f"{text}, 5 windows of 128 tokens, 1 of them held out")
    assert outcome.evaluation == "1 window of 128 tokens held out of the calibration text"
    assert outcome.perplexity_dense is not None
    assert outcome.perplexity_compressed is not None
    assert outcome.perplexity_dense > 1
    assert outcome.kl is not None
    assert outcome.kl > 0
    assert outcome.forward_passes is not None
    assert outcome.forward_passes > 1, "calibration alone is a pass"
    result.save(tmp_path / "small")
    assert evaluate(tmp_path / "small", text, window=128, windows=2).perplexity > 1
    assert evaluate(result.model, tokens(2, 16)).windows == 2


@pytest.mark.parametrize("ratio", [0, -0.1, 0.951, 1, float("nan")])
def test_ratios_outside_are_refused(ratio: float) -> None:
    with pytest.raises(InputError, match=r"outside \(0, 0\.95\]"):
        mg.compress("demo", ratio)


def test_a_ratio_that_the_sites_cannot_give_names_the_largest(tiny: Callable[..., nn.Module]) -> None:
    with pytest.raises(InputError, match="0\\.9") as error:
        mg.compress(tiny(), 0.95, calibration=tokens())
    assert "\n" not in str(error.value)


def test_every_public_name_is_a_function_or_a_class() -> None:
    for name in mg.__all__:
        assert callable(getattr(mg, name)), name


# Command line: one line, exit code 2, and nothing left behind.

WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "boil",
    "soup",
)


def write_text(path: Path) -> Path:
    """A few thousand words in no order that repeats soon."""
    words = (WORDS[(number * number + number // 7) % len(WORDS)] for number in itertools.count())
    path.write_text(" ".join(itertools.islice(words, 3000)))
    return path


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: Any) -> Path:
    """A tiny model with a real tokenizer."""
    return saved(tmp_path_factory.mktemp("models") / "tiny", demo_tokenizer, 1.0)


def saved(folder: Path, tokenizer: Any, scale: float) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        for part in model.model.layers[1].mlp.children():
            if isinstance(part, nn.Linear):
                part.weight.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: Any, monkeypatch: Any, tmp_path: Path) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run the program in an empty folder; gives exit code and standard error without the progress lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(runtime, "debugging", False)
    environment = dict(os.environ)

    def call(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error:") or "Traceback" in line]
        assert captured.out == ""
        assert captured.err.splitlines()[-1:] == lines, "the error is the last line, and the only one"
        return int(end.value.code or 0), lines[0]

    with warnings.catch_warnings():
        yield call
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


SMALL = ("--ratio", "0.3", "--out", "small")
WINDOWS = ("--calib-windows", "4", "--calib-window", "128")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-model", *SMALL), "no-such-model"),
        (("./nowhere", *SMALL), "there is no folder ./nowhere"),
        (("empty", *SMALL), "empty has no config.json; give the folder of a transformers model"),
        (("llama-2-7b", *SMALL), "is a configuration without weights"),
        (("{tiny}", "--ratio", "1.5", "--out", "small"), "--ratio 1.5 is outside (0, 0.95]"),
        (("{tiny}", "--ratio", "0.95", "--out", "small", "--calib", "text.txt", *WINDOWS), "0.9"),
        (("{tiny}", *SMALL, "--calib", "none.txt"), "--calib none.txt: there is no such file"),
        (("{tiny}", *SMALL, "--calib", "blank.txt"), "the text file blank.txt holds no text"),
        (("{tiny}", *SMALL, "--calib", "short.txt"), "calibration needs 128 at least"),
        (("{tiny}", *SMALL, "--calib", "wikitext"), "did you mean wikitext2?"),
        (("{tiny}", "--ratio", "0.3", "--out", "full", "--calib", "text.txt"), "--out full exists and is not empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Callable[..., tuple[int, str]],
    text_folder: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    write_text(tmp_path / "text.txt")
    (tmp_path / "blank.txt").write_text(" \n\n \n")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.bin").write_bytes(b"x")
    before = tree(tmp_path)
    code, line = run("compress", *(argument.replace("{tiny}", str(text_folder)) for argument in arguments))
    assert message in line
    assert code == 2
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("scale", "options", "advice"),
    [
        (1e13, (), "float32 does not hold them either"),
        (1e4, ("--dtype", "float16"), "try --dtype float32"),
    ],
    ids=["float32", "float16"],
)
def test_a_model_that_overflows_is_refused(
    run: Callable[..., tuple[int, str]],
    tmp_path: Path,
    demo_tokenizer: Any,
    scale: float,
    options: tuple[str, ...],
    advice: str,
) -> None:
    saved(tmp_path / "huge", demo_tokenizer, scale)
    write_text(tmp_path / "text.txt")
    before = tree(tmp_path)
    code, line = run("compress", "huge", *SMALL, "--calib", "text.txt", *WINDOWS, *options)
    assert "model.layers.1.mlp" in line
    assert "non-finite entries" in line
    assert advice in line
    assert code == 2
    assert tree(tmp_path) == before


def test_so_is_one_that_overflows_while_it_writes_its_own_text(
    run: Callable[..., tuple[int, str]], tmp_path: Path, tiny: Callable[..., Any]
) -> None:
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    model.save_pretrained(tmp_path / "huge")
    before = tree(tmp_path)
    code, line = run("compress", "huge", *SMALL, "--calib", "self", "--calib-window", "8")
    assert "finite" in line
    assert code == 2
    assert tree(tmp_path) == before


def test_a_failure_while_saving_leaves_nothing(tmp_path: Path) -> None:
    result = shrunk("llama").result
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    with pytest.raises(ModegptError):
        result.save(tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "kept"]
