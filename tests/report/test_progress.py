import io

import pytest
from rich.console import Console

from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.report.progress import ConsoleProgress


def work(progress: Progress) -> None:
    with progress.stage("calibrate", total=3) as stage:
        for _ in range(3):
            stage.advance()
    progress.note("the hub did not answer; text is sampled from the model")
    with progress.stage("rewrite [red]"):
        pass


def test_a_log_gets_a_line_for_each_stage_and_no_escapes():
    file = io.StringIO()
    with ConsoleProgress(Console(file=file, width=30)) as progress:
        work(progress)
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("✓ calibrate  ")
    assert lines[1] == "note: the hub did not answer; text is sampled from the model"
    assert lines[2].startswith("✓ rewrite [red]  ")
    assert "\x1b" not in file.getvalue()


def test_a_stage_that_fails_is_not_ticked():
    file = io.StringIO()
    with ConsoleProgress(Console(file=file)) as progress, pytest.raises(ZeroDivisionError), progress.stage("calibrate"):
        _ = 1 / 0
    assert "✓" not in file.getvalue()


def test_nobody_need_watch():
    work(NullProgress())
