"""The bench command: both models' speed, of a folder that compress wrote."""

import json
from pathlib import Path

import pytest
import torch
from fixtures.families import family, tokens

import modegpt_graph as mg
from modegpt_graph import api
from modegpt_graph.commands import bench as command
from modegpt_graph.errors import InputError


def test_both_models_are_measured_and_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = family("llama")
    dense.save_pretrained(tmp_path / "dense")
    mg.compress(dense, 0.4, calibration=tokens(), evaluate=False).save(tmp_path / "small")
    file = tmp_path / "speed.json"
    command.bench(tmp_path / "small", str(tmp_path / "dense"), prompt=8, new_tokens=2, rounds=2, seed=0, json_file=file)
    found = json.loads(file.read_text())
    assert set(found) == {"prefill", "decode"}
    for one in found.values():
        assert min(one.values()) > 0
    assert "compressed" in capsys.readouterr().out


def test_a_folder_that_is_not_compressed_is_refused(tmp_path: Path) -> None:
    family("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="holds no compressed model"):
        api.bench(tmp_path / "dense", tmp_path / "dense")


def test_a_model_without_a_cache_has_no_speed(tmp_path: Path) -> None:
    mg.compress(family("llama"), 0.4, calibration=tokens(), evaluate=False).save(tmp_path / "small")
    with pytest.raises(InputError, match="generate"):
        api.bench(tmp_path / "small", torch.nn.Linear(2, 2))
