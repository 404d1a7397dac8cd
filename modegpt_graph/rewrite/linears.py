"""The linear modules of a model, by path."""

from torch import nn


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The `nn.Linear` that is known to be there."""
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear
