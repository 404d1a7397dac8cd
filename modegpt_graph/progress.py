"""How long work says where it is and how long it took: stages with a name and, where it is known, a number of steps."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol


class Stage(Protocol):
    """One stage under way."""

    def advance(self, n: int = 1) -> None:
        """Another `n` steps of the stage are done."""
        ...


class Progress(Protocol):
    """What long work is handed. A stage is a context manager; stages follow each other or nest."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """Open the stage `name` ("calibrate", a verb in the user's words) of `total` steps, None where not known."""
        ...

    def note(self, message: str) -> None:
        """Tell the person one line at once, without waiting for the final report (a fallback that was taken)."""
        ...


class NullStage:
    """A stage that nobody watches."""

    def advance(self, n: int = 1) -> None:
        """Nothing to tell."""


class NullProgress:
    """Progress that nobody watches: what the Python API uses where no progress was given."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """A stage that nobody watches."""
        return nullcontext(NullStage())

    def note(self, message: str) -> None:
        """Nobody to tell."""


class Clock:
    """Seconds by stage, in the order they ran; a stage that runs again adds to what it took."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what runs within this context as `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
