"""The sweep over every causal language model type: a sample of it again, and what the README says of it."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))  # the sweep builds its models with the module beside it
SPEC = importlib.util.spec_from_file_location("sweep", ROOT / "tools" / "coverage.py")
assert SPEC is not None
assert SPEC.loader is not None
sweep = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sweep)

FILE = ROOT / "tools" / "coverage.json"
SAMPLE = 12
ROWS: dict[str, Any] = sweep.read_rows(FILE)
PASSED = sorted(kind for kind, row in ROWS.items() if sweep.passed(row))


@pytest.mark.parametrize("kind", PASSED[:: max(1, -(-len(PASSED) // SAMPLE))])
def test_a_type_that_passed_passes_again(kind: str) -> None:
    """Every so many of them, by name; the rest of the table is only as old as the file."""
    row = sweep.examine(kind)
    assert sweep.passed(row), row["stopped"]
    assert row["coverage"] == ROWS[kind]["coverage"]
    assert row["sites"] == ROWS[kind]["sites"]


def test_the_summary_is_that_of_the_rows() -> None:
    assert json.loads(FILE.read_text(encoding="utf-8"))["summary"] == sweep.summary(ROWS)
    assert (ROOT / "tools" / "coverage.md").read_text(encoding="utf-8").count("\n| ") == len(ROWS) + 1


def test_the_readme_says_what_the_file_says(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(readme, encoding="utf-8")
    sweep.put_into(copy, ROWS)
    assert copy.read_text(encoding="utf-8") == readme


def test_every_type_that_stopped_says_why_in_one_line() -> None:
    for kind, row in ROWS.items():
        stopped = row["stopped"]
        assert sweep.passed(row) or (stopped and "\n" not in stopped), kind


def test_every_matrix_left_alone_has_a_reason() -> None:
    for kind, row in ROWS.items():
        for entry in (*row.get("unmatched", ()), *row.get("refused", ())):
            matrix, _, reason = entry.partition(": ")
            assert matrix, kind
            assert len(reason) > 20, (kind, entry)
