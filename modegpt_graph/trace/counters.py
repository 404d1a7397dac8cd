"""What a model counts in plain Python from one call to the next: no graph of one call shows it.

A table that is made on the first call is the same after the second; a position that goes on is another.
"""

from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from modegpt_graph.errors import ModegptError
from modegpt_graph.trace.calls import SIZES, runs_of
from modegpt_graph.trace.fake import REGISTRIES
from modegpt_graph.trace.numbers import with_other_numbers


def counted(skeleton: nn.Module, example_inputs: tuple) -> tuple[str, ...]:
    """Paths of the attributes of a model (on the meta device) that a second call leaves with other values than a first.

    The second call is the first again, or goes on after its last token. Where there can be no second call, those that
    the first changed.
    """
    changed: dict[str, None] = {}
    for second in (example_inputs, *with_other_numbers(skeleton, example_inputs, SIZES[0].tokens)):
        twice = _Twice(skeleton, second)
        with suppress(ModegptError):  # what cannot be run counts nothing
            runs_of(twice, {}, SIZES[:1], [example_inputs])
        changed |= twice.changed
    return tuple(changed)


class _Twice(nn.Module):
    """Calls a model twice, and says what the second call changed. second: its example inputs."""

    def __init__(self, model: nn.Module, second: tuple) -> None:
        super().__init__()
        self.model, self.second = model, second
        self.changed: dict[str, None] = {}

    def forward(self, tokens: Tensor, *rest: Any) -> None:
        before = _values(self.model)
        self.model(tokens, *rest)
        first = _values(self.model)
        try:
            self.model(tokens, *self.second[1:])
        except Exception:  # a model's own code may say no to what it is given in any way
            second = before
        else:
            second = _values(self.model)
        self.changed |= dict.fromkeys(path for path, value in first.items() if second.get(path) != value)


def _values(model: nn.Module) -> dict[str, object]:
    """Path → value of every number and word that the parts of a model keep; the length of every list."""
    found: dict[str, object] = {}
    for path, part in model.named_modules():
        for name, value in vars(part).items():
            where = ".".join(filter(None, [path, name]))
            if isinstance(value, (bool, int, float, str)):
                found[where] = value
            elif name not in REGISTRIES and type(value) in (list, tuple, dict):
                found[where] = len(value)
    return found
