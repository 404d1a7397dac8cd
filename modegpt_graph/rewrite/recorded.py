"""How modules of a dense model are called, and how far a smaller model's are from it when they are called the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import exact
from modegpt_graph.rewrite.lockstep import SteppedPass, current_pass


@dataclass
class Call:
    """What a module was called with, and what the consumer in it put out."""

    args: tuple
    kwargs: dict
    output: Tensor | None = None


@contextmanager
def recorded(model: nn.Module, modules: Mapping[str, str]) -> Iterator[None]:
    """Within this context every stepped pass keeps how modules are called, until it is taken.

    modules: path of a consumer → path of the module that it is in.
    """

    def called(path: str):
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if (own := current_pass()) is not None:
                own.state["call", path] = Call(args, kwargs)

        return hook

    def answered(path: str):
        def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
            if (own := current_pass()) is not None and ("call", path) in own.state:
                own.state["call", path].output = output

        return hook

    handles = []
    try:
        for path, module in modules.items():
            handles.append(model.get_submodule(module).register_forward_pre_hook(called(path), with_kwargs=True))
            handles.append(model.get_submodule(path).register_forward_hook(answered(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def taken(one: SteppedPass, path: str) -> Call | None:
    """The call of a consumer's module in this pass, which keeps it no longer; None where there was none."""
    return one.state.pop(("call", path), None)


def error_when_called(
    module: nn.Module, consumer: nn.Module, calls: Sequence[Call], scales: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Squared error over squared norm of what a smaller model's consumer puts out, when its module is called so.

    scales: from what it should put out, (…, D), to (T, 1) what its rows count; all the same where None.
    """
    found: list[Tensor] = []

    def answered(_: nn.Module, args: tuple, output: Tensor) -> None:
        found.append(output)

    handle = consumer.register_forward_hook(answered)
    lost = size = 0.0
    try:
        for call in calls:
            assert call.output is not None
            with torch.no_grad():
                module(*call.args, **call.kwargs)
                scale = 1.0 if scales is None else scales(call.output)
            expected = exact(call.output).flatten(0, -2)
            missed = exact(found.pop()).flatten(0, -2) - expected
            lost += float((missed * scale).square().sum(dtype=torch.float64))
            size += float((expected * scale).square().sum(dtype=torch.float64))
    finally:
        handle.remove()
    return lost / size if size else 0.0
