"""Progress bars for a person at a terminal, one line a stage for a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from modegpt_graph.report import words


class _Steps(MofNCompleteColumn):
    """`3/12`, and nothing where it is not known how many steps there are."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class BarStage:
    """A stage drawn as a bar."""

    def __init__(self, bars: Progress, task: TaskID):
        self._bars = bars
        self._task = task

    def advance(self, n: int = 1) -> None:
        """Another `n` steps are done."""
        self._bars.advance(self._task, n)


class ConsoleProgress:
    """Stages on `console` (standard error, so that results can be piped), within a `with` block.

    On a terminal: a bar for the stage under way, gone when its block ends. Elsewhere: a line when a stage ends.
    """

    def __init__(self, console: Console):
        self._console = console
        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            _Steps(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "ConsoleProgress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[BarStage]:
        """A bar of `total` steps; a line with the time it took once it is done."""
        task = self._bars.add_task(name, total=total)
        started = time.perf_counter()
        try:
            yield BarStage(self._bars, task)
        finally:
            self._bars.remove_task(task)
        took = words.seconds(time.perf_counter() - started)
        self._console.print(Text.assemble(("✓ ", "green"), name, (f"  {took}", "dim")), soft_wrap=True)

    def note(self, message: str) -> None:
        """One line at once."""
        self._console.print(Text.assemble(("note: ", "bold"), message), soft_wrap=True)
