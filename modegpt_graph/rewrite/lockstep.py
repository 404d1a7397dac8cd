"""Forward passes that stop where a hook tells them to: several batches and models go through their layers side by side.

A model is called as it is, so that whatever its layers are given (masks, positions, inputs of their own) is the
model's affair. Each pass has a thread to be stopped in, and only one thread runs at a time.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch


class _Abandoned(BaseException):
    """Ends a pass that nobody goes on with."""


class SteppedPass(threading.Thread):
    """One forward pass, from stop to stop. state: whatever the hooks keep of this pass.   result: at its end."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.state: dict[Any, Any] = {}
        self.result: Any = None
        self._work = work
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._value: Any = None
        self._error: Exception | None = None
        self._is_abandoned = False

    def advance(self) -> Any:
        """Go on to the next stop, and return what the hook gave there; None at the end. Raises what the pass raises."""
        if self._is_abandoned:
            return None
        if self.ident is None:
            self.start()
        else:
            self._go.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error
        return self._value

    def abandon(self) -> None:
        """End the pass where it is."""
        if self.is_alive():
            self._is_abandoned = True
            self._go.release()
            self.join()

    def run(self) -> None:
        """The thread's own work; not to be called."""
        try:
            with torch.no_grad():  # the mode is a thread's own
                self.result = self._work()
        except _Abandoned:
            return
        except Exception as error:
            self._error = error
        self._value = None
        self._is_abandoned = True
        self._halted.release()

    def stop(self, value: object) -> None:
        """Within a hook: hand `value` to whoever advances this pass, and wait."""
        self._value = value
        self._halted.release()
        self._go.acquire()
        if self._is_abandoned:
            raise _Abandoned


def current_pass() -> SteppedPass | None:
    """The pass in which a hook is called; None outside of one."""
    thread = threading.current_thread()
    return thread if isinstance(thread, SteppedPass) else None
