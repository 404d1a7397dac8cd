"""The command itself, on a tiny model with the demo model's tokenizer."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from modegpt_graph import cli


@pytest.fixture
def folder(tiny, demo_tokenizer: Any, tmp_path: Path) -> Path:
    tiny(vocab_size=len(demo_tokenizer)).save_pretrained(tmp_path / "tiny")
    demo_tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_one_run_gives_table_json_and_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, {"COLUMNS": "120", "TOKENIZERS_PARALLELISM": "false"}.get(name, "error"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {number}th word of a text about number {number * 7}." for number in range(400)))
    words = ["compare", folder, "--methods", "flap,svd,shortgpt", "--ratios", "0.5,0.3", "--calib", text]
    words += [
        "--calib-windows",
        "8",
        "--calib-window",
        "128",
        "--html",
        tmp_path / "a.html",
        "--json",
        tmp_path / "a.json",
    ]
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    assert not end.value.code
    plain = json.loads((tmp_path / "a.json").read_text())
    assert [(one["method"], one["ratio"]) for one in plain["results"]] == [
        (method, ratio) for method in ("flap", "svd", "shortgpt") for ratio in (0.3, 0.5)
    ]
    assert all(one["reason"] is None for one in plain["results"])
    assert "held out" in plain["evaluation"]
    assert (tmp_path / "a.html").read_text(encoding="utf-8").count("<path ") == 3
    assert "shortgpt" in capsys.readouterr().out
