"""What a model of the user's own keeps from call to call, so that it can be put back after it was measured."""

import torch
from torch import Tensor, nn

from modegpt_graph.models.forward import can_generate


class Contents:
    """Buffers and plain tensors of a model's parts, as they are now. A model of the library keeps none of its own."""

    def __init__(self, model: nn.Module) -> None:
        held: dict[int, Tensor] = {}
        if not can_generate(model):
            for part in model.modules():
                values = (*part._buffers.values(), *vars(part).values())
                held |= {id(value): value for value in values if isinstance(value, Tensor)}
        self._before = [(tensor, tensor._version, tensor.detach().clone()) for tensor in held.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was written over."""
        for tensor, version, value in self._before:
            if tensor._version != version:
                tensor.copy_(value)
