"""Where a module's own Python asks for the value of a size while it is traced: the rest holds for some sizes only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental.symbolic_shapes import uninteresting_files

_TORCH = Path(torch.__file__).parent
# Torch's own modules are written like a user's: their Python branches are branches of the model.
_MODULES = str(_TORCH / "nn")
_OWN = str(Path(__file__).parent.parent)
_ASKED = (
    (torch.SymBool, "__bool__"),
    (torch.SymInt, "__bool__"),
    (torch.SymInt, "__int__"),
    (torch.SymInt, "__index__"),
)


@contextmanager
def watched_branches() -> Iterator[list[str]]:
    """Within this context, the places ("file.py:12") at which Python code outside of the tracer turns a symbolic size
    into a number or a comparison of sizes into a truth are added to the list."""
    uninteresting_files().add(__file__)  # torch reads off the code that asks whether it asserts: that is not here
    places: dict[str, None] = {}
    found: list[str] = []

    def asked(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def answer(value: Any) -> Any:
            caller = sys._getframe(1)
            file = caller.f_code.co_filename
            if file.startswith(_MODULES) or not file.startswith((str(_TORCH), _OWN)):
                place = f"{PurePath(file).name}:{caller.f_lineno}"
                if place not in places:
                    places[place] = None
                    found.append(place)
            return own(value)

        return answer

    patches = [patch.object(kind, name, asked(getattr(kind, name))) for kind, name in _ASKED]
    try:
        for one in patches:
            one.start()
        yield found
    finally:
        for one in patches:
            one.stop()
