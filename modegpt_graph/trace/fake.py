"""Meta tensors as fake CPU tensors while a module is traced: shapes without storage, constants with their values.

A constant that a module makes on its parameters' device (`x[..., [-2], :]` makes an index tensor) has no value on the meta
device. On a fake CPU device it has.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_cpu(module: nn.Module, inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Within this context the meta tensors of `module` are fake CPU tensors; yields `inputs` as such.

    The module is left as it was. Real tensors stay what they are, and then so do all.
    """
    held = [(m, store) for m in module.modules() for store in _stores(m)]
    tensors = [*inputs, *(value for _, store in held for value in store.values() if isinstance(value, Tensor))]
    if not any(value.device.type == "meta" for value in tensors) or not all(map(_replaceable, tensors)):
        yield tuple(inputs)
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    replaced: dict[int, Tensor] = {}

    def fake(value: Tensor) -> Tensor:
        if value.device.type != "meta":
            return value
        if id(value) not in replaced:
            with mode:
                twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            replaced[id(value)] = (
                nn.Parameter(twin, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else twin
            )
        return replaced[id(value)]

    before = [dict(store) for _, store in held]
    try:
        for _, store in held:
            store.update({name: fake(value) for name, value in store.items() if isinstance(value, Tensor)})
        yield tuple(fake(value) for value in inputs)
    finally:
        for (_, store), values in zip(held, before, strict=True):
            store.update(values)


def _stores(module: nn.Module) -> list[dict]:
    return [module._parameters, module._buffers, module.__dict__]


def _replaceable(value: Tensor) -> bool:
    """Whether a tensor has no value that the trace might need: a meta tensor, or one of the model's small tables."""
    return value.device.type in ("meta", "cpu")
