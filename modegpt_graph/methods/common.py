"""What every method is given, and what it gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.observe import Calibrated
from modegpt_graph.calibrate.text import Calibration
from modegpt_graph.errors import ModegptError
from modegpt_graph.match.prepare import Surveyed
from modegpt_graph.match.site_module import SiteModule
from modegpt_graph.models import forward_logits
from modegpt_graph.progress import Progress


class Unavailable(ModegptError):
    """A method needs what this model's graph lacks; the message says what."""


@dataclass(frozen=True)
class Setting:
    """One dense model, analysed and calibrated once for all methods.

    modules: its sites in their modules.   layers: paths of its decoder layers.   sizes: decoder-layer matrix → its
    parameters; their sum is what every ratio is of.   text: what all of them are calibrated on.
    """

    dense: nn.Module
    surveyed: Surveyed
    modules: tuple[SiteModule, ...]
    layers: tuple[str, ...]
    sizes: Mapping[str, int]
    text: Calibration
    observed: Calibrated
    seed: int
    progress: Progress

    @property
    def tokens(self) -> Tensor:
        """(windows, window) of the calibration text."""
        return self.text.tokens

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Smaller:
    """A model to be measured. removed: decoder-layer matrix parameters that went, less those of adapters that came."""

    model: nn.Module
    removed: int


Pass = Callable[[float], Smaller]
"""A method that is ready: from the ratio asked for to a model. Raises ModegptError where it cannot be met."""


def check_runs(model: nn.Module, setting: Setting) -> None:
    """Raise Unavailable where a model's own code does not work with the modules that took the place of its own."""
    try:
        with torch.no_grad():
            forward_logits(model, setting.tokens[:1, :2])
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"the model's own code does not run with its modules replaced: {reason[0]}") from error
