"""What modules read and return on the calibration text: Gram matrices and mean absolute values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.observe import TOKENS_PER_BATCH
from modegpt_graph.calibrate.statistics import Gram
from modegpt_graph.methods.common import Setting
from modegpt_graph.models import forward_logits


@dataclass(frozen=True)
class Place:
    """The tensor that a module reads first, or the one that it returns (first)."""

    path: str
    output: bool = False


@dataclass(frozen=True)
class Values:
    """gram: (N + 1, N + 1) of [X, 1] over all tokens.   absolute: (N,) mean of |X|."""

    gram: Tensor
    absolute: Tensor


def unchanged(rows: Tensor) -> Tensor:
    """Rows as they are."""
    return rows


class _Sums:
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change
        self.gram: Gram | None = None
        self.absolute: Tensor | None = None

    def add(self, value: Tensor) -> None:
        rows = self.change(value.detach().reshape(-1, value.shape[-1]).float())
        if self.gram is None or self.absolute is None:
            self.gram = Gram(rows.shape[1])
            self.absolute = torch.zeros(rows.shape[1], dtype=torch.float64)
        self.gram.add(rows)
        self.absolute += rows.abs().sum(0, dtype=torch.float64)


def observe(
    setting: Setting, places: Mapping[str, Place], name: str, change: Callable[[Tensor], Tensor] = unchanged
) -> dict[str, Values]:
    """Run the calibration text through the dense model once more and sum what passes at every place.

    name: of the stage, for progress.   change: what is done to the rows (T, N) before they are summed.
    A place that saw nothing (an expert that no token went to) is left out.
    """
    sums = {key: _Sums(change) for key in places}
    handles = [_hook(setting.dense.get_submodule(place.path), place, sums[key]) for key, place in places.items()]
    try:
        windows = setting.tokens.split(max(1, TOKENS_PER_BATCH // setting.tokens.shape[1]))
        with torch.no_grad(), setting.progress.stage(name, len(setting.tokens)) as stage:
            for batch in windows:
                forward_logits(setting.dense, batch)
                stage.advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    return {
        key: Values(one.gram.augmented(), one.absolute / one.gram.rows)
        for key, one in sums.items()
        if one.gram is not None and one.absolute is not None
    }


def _hook(module: nn.Module, place: Place, sums: _Sums) -> torch.utils.hooks.RemovableHandle:
    def first(values: object) -> Tensor:
        found = next((v for v in values if isinstance(v, Tensor)), None) if isinstance(values, tuple) else values
        assert isinstance(found, Tensor)
        return found

    if place.output:
        return module.register_forward_hook(lambda _, inputs, result: sums.add(first(result)))
    return module.register_forward_pre_hook(
        lambda _, inputs, keywords: sums.add(first((*inputs, *keywords.values()))), with_kwargs=True
    )
