"""Meta tensors as fake CPU tensors while a module is traced: shapes without storage, constants with their values.

A constant that a module makes on its parameters' device (`x[..., [-2], :]` makes an index tensor) has no value on the
meta device. On a fake CPU device it has.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, optimization_hint

REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})
_NOT_OF_A_MODEL = frozenset({"torch", "builtins", "typing"})


@contextmanager
def fake_cpu(
    module: nn.Module, inputs: Sequence[Tensor] = (), *, data_sizes: bool = False
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within this context the meta tensors of `module` are fake CPU tensors; yields a function that makes others so.

    inputs: what the module will be given, after that function.   data_sizes: whether sizes that depend on data (tokens
    of an expert) are let through as unknown, and no error. The module is left as it was. Where nothing is on
    the meta device, or something is on another, all tensors stay what they are.
    """
    stores = [store for part in module.modules() for store in _stores(part)]
    tensors = [*inputs, *(tensor for store in stores for value in store.values() for _, tensor in _tensors(value))]
    devices = {value.device.type for value in tensors}
    if "meta" not in devices or devices - {"meta", "cpu"}:
        with kept_state(module):
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

    with kept_state(module):
        for store in stores:
            kept = {name: value for name, value in store.items() if name not in REGISTRIES and any(_tensors(value))}
            store.update({name: _mapped(value, fake) for name, value in kept.items()})
        for part in module.modules():  # torch.export takes buffers, and not all that is done with other attributes
            own = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
            own = {name: value for name, value in own.items() if not hasattr(type(part), name)}
            part._buffers.update(own)
            for name in own:
                del part.__dict__[name]
        yield fake


@contextmanager
def kept_state(module: nn.Module) -> Iterator[None]:
    """What a forward pass keeps (a table that it makes once, in a module or in a function's cache) is gone after this
    context, and nothing is kept in functions' caches within it."""
    before = [(store, dict(store)) for part in module.modules() for store in _stores(part)]
    caches = list(_function_caches(module))
    try:
        for owner, name, cached in caches:
            setattr(owner, name, cached.__wrapped__)
        yield
    finally:
        for owner, name, cached in caches:
            setattr(owner, name, cached)
        for store, values in before:
            store.clear()
            store.update(values)


def _function_caches(module: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, function) of every function with a cache of its own beside the classes of a module's parts."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    files = {kind.__module__: sys.modules.get(kind.__module__) for kind in kinds}
    for owner in (*kinds, *files.values()):
        if owner is not None and getattr(owner, "__module__", owner.__name__).split(".")[0] not in _NOT_OF_A_MODEL:
            for name, value in list(vars(owner).items()):
                if isinstance(value, functools._lru_cache_wrapper):
                    yield owner, name, value


def kept_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """(path, tensor) of what a module's parts keep in plain attributes, and in lists there."""
    found = []
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in REGISTRIES:
                places = [
                    (inner, tensor) for inner, tensor in _tensors(value) if not any("." in part for part in inner)
                ]
                found += [(".".join(filter(None, [path, name, *inner])), tensor) for inner, tensor in places]
    return found


def held_tensors(module: nn.Module) -> dict[str, tuple[dict[str, Any], str, Tensor]]:
    """Path → (the dictionary that holds it, its name in there, the tensor), for all tensors of a module's parts but
    parameters; the name of one in a list or dictionary of its own is that of the attribute."""
    found = {}
    for path, part in module.named_modules():
        for store in (part._buffers, vars(part)):
            for name, value in store.items():
                if name not in REGISTRIES:
                    for inner, tensor in _tensors(value):
                        found[".".join(filter(None, [path, name, *inner]))] = store, name, tensor
    return found


def _tensors(value: Any, inner: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Tensors in a value or in its lists and tuples, with their places in these."""
    if isinstance(value, Tensor):
        yield inner, value
    elif type(value) in (list, tuple):
        for place, item in enumerate(value):
            yield from _tensors(item, (*inner, str(place)))
    elif type(value) is dict:
        for key, item in value.items():
            yield from _tensors(item, (*inner, repr(key)))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return {key: _mapped(item, change) for key, item in value.items()} if type(value) is dict else value


def _stores(module: nn.Module) -> list[dict]:
    return [module._parameters, module._buffers, module.__dict__]


def on_meta(value: Tensor, unknown: int) -> Tensor:
    """A fake tensor as a meta tensor of the same shape, strides and dtype. unknown: for sizes that depend on data."""
    shape = [
        size if isinstance(size, int) else optimization_hint(size, fallback=unknown) or unknown for size in value.shape
    ]
    stride = [optimization_hint(size, fallback=unknown) for size in value.stride()]
    return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
