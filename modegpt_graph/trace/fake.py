"""Meta tensors as fake CPU tensors while a module is traced: shapes without storage, constants with their values.

A constant that a module makes on its parameters' device (`x[..., [-2], :]` makes an index tensor) has no value on the
meta device. On a fake CPU device it has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, optimization_hint


@contextmanager
def fake_cpu(
    module: nn.Module, inputs: Sequence[Tensor] = (), *, data_sizes: bool = False
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within this context the meta tensors of `module` are fake CPU tensors; yields a function that makes others so.

    inputs: what the module will be given, after that function.   data_sizes: whether sizes that depend on data (tokens
    of an expert) are let through as unknown, and no error. The module is left as it was. Where nothing is on
    the meta device, or something is on another, all tensors stay what they are.
    """
    held = [(m, store) for m in module.modules() for store in _stores(m)]
    tensors = [*inputs, *(value for _, store in held for value in store.values() if isinstance(value, Tensor))]
    devices = {value.device.type for value in tensors}
    if "meta" not in devices or devices - {"meta", "cpu"}:
        yield lambda value: value
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(trace_asserts=True) if data_sizes else None)
    replaced: dict[int, tuple[Tensor, Tensor]] = {}  # the original is held, so that its id stays its own

    def fake(value: Tensor) -> Tensor:
        if value.device.type != "meta":
            return value
        if id(value) not in replaced:
            with mode:
                twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            if isinstance(value, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=value.requires_grad)
            replaced[id(value)] = value, twin
        return replaced[id(value)][1]

    before = [dict(store) for _, store in held]
    try:
        for _, store in held:
            store.update({name: fake(value) for name, value in store.items() if isinstance(value, Tensor)})
        yield fake
    finally:
        for (_, store), values in zip(held, before, strict=True):
            store.update(values)


def _stores(module: nn.Module) -> list[dict]:
    return [module._parameters, module._buffers, module.__dict__]


def on_meta(value: Tensor, unknown: int) -> Tensor:
    """A fake tensor as a meta tensor of the same shape, strides and dtype. unknown: for sizes that depend on data."""
    shape, stride = (
        [optimization_hint(size, fallback=unknown) for size in sizes] for sizes in (value.shape, value.stride())
    )
    return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
