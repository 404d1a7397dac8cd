"""What an earlier run found gives the same model, bit for bit; what is not sound is measured again."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.families import family, tokens
from fixtures.library import build

import modegpt_graph as mg
from modegpt_graph.calibrate import store as room
from modegpt_graph.calibrate.store import Store, run_key
from modegpt_graph.compression import prepare
from modegpt_graph.models import resolve


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, in which the shortest work is kept."""
    monkeypatch.setenv("MODEGPT_GRAPH_CACHE", str(tmp_path))
    monkeypatch.setattr(room, "LEAST_SECONDS", 0.0)
    return tmp_path / "calibrations"


def compressed(model: Any, **changed: Any) -> mg.Result:
    settings = {"ratio": 0.3, "calibration": tokens(), "evaluate": False} | changed
    return mg.compress(model, **settings)


def reused(result: mg.Result) -> int:
    assert result.report.outcome is not None
    return len(result.report.outcome.reused)


def same(one: mg.Result, other: mg.Result) -> bool:
    left, right = one.model.state_dict(), other.model.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_second_run_reuses_and_says_so_and_gives_the_same_model(folder: Path) -> None:
    model = family("llama")
    first = compressed(model)
    assert reused(first) == 0
    assert len(list(folder.iterdir())) == 3  # statistics, and what sites and two choices of features do to the logits
    second = compressed(model, ratio=0.3)
    assert reused(second) == 3
    assert same(first, second)
    assert reused(compressed(model, ratio=0.5)) == 3
    assert reused(compressed(model, cache=False)) == 0
    # Whatever figures depend on makes another key: text, weights, algorithms.
    assert reused(compressed(model, calibration=tokens(seed=1))) == 0
    assert reused(compressed(family("llama", seed=1))) == 0
    assert reused(compressed(model, preset="paper", allocator="uniform")) == 0


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "empty"])
def test_a_damaged_or_foreign_file_is_measured_again_and_replaced(folder: Path, damage: str) -> None:
    model = family("llama")
    first = compressed(model, preset="paper", allocator="uniform")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    if damage == "changed":
        file.write_bytes(whole[:-40] + bytes(40))
    elif damage == "foreign":
        room.save_file({"importance": torch.zeros(2)}, file)
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    again = compressed(model, preset="paper", allocator="uniform")
    assert reused(again) == 0
    assert same(first, again)
    assert reused(compressed(model, preset="paper", allocator="uniform")) == 1


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_statistics_come_back_exactly(folder: Path, name: str) -> None:
    observed = prepare(resolve(build(name, "cpu")), calibration=tokens(60), evaluating=False).decomposed.observed
    assert observed.other
    store = Store(folder)
    store.keep_statistics("key", observed, 7.0)
    found = store.statistics("key", observed.statistics)
    assert found is not None
    assert found.seconds == 7.0
    assert found.calibrated.tokens == observed.tokens
    assert torch.equal(found.calibrated.importance, observed.importance)
    assert found.calibrated.other.keys() == observed.other.keys()
    for site, own in [*observed.statistics.items(), *observed.other.items()]:
        other = found.calibrated.other[site] if observed.other.get(site) is own else found.calibrated.statistics[site]
        assert type(own) is type(other)
        for field in dataclasses.fields(own):
            value, back = getattr(own, field.name), getattr(other, field.name)
            pairs = zip(value, back, strict=True) if isinstance(value, tuple) else [(value, back)]
            assert all(torch.equal(left, right) for left, right in pairs)
    assert store.statistics("key", [*observed.statistics, "another site"]) is None
    assert store.statistics("another key", observed.statistics) is None


def test_the_oldest_files_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(folder)
    monkeypatch.setattr(room, "LARGEST", 30_000)
    numbers = {str(number): float(number) for number in range(1000)}  # 8,000 bytes of values, and their names
    for age, key in enumerate(("a", "b", "c", "d")):
        store.keep_numbers(key, numbers, 7.0)
        os.utime(folder / f"{key}.safetensors", (age, age))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 30_000 + 8_000
    assert store.numbers("a", numbers) is None
    assert store.numbers("d", numbers) == (numbers, 7.0)
    monkeypatch.setattr(room, "LARGEST", 100)
    store.keep_numbers("e", numbers, 7.0)
    assert store.numbers("e", numbers) is None


def test_what_took_no_time_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LEAST_SECONDS", 5.0)
    Store(folder).keep_numbers("a", {"site": 1.0}, 4.9)
    assert not folder.exists()


def test_the_key_is_of_names_values_and_shapes() -> None:
    ids = tokens()
    keys = {
        run_key(family("llama", seed=seed), graph, [text], *parts)
        for seed in (0, 1)
        for graph in ("a", "b")
        for text in (ids, ids[:-1])
        for parts in ((), (True,))
    }
    assert len(keys) == 16
