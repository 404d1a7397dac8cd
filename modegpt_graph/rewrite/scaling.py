"""Producers whose outputs do nothing but scale features, as a gated MLP's up projection: found by what a pass shows."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from modegpt_graph.models import forward_logits
from modegpt_graph.rewrite.linears import linear_at

UNEXPLAINED = 0.02  # of the features; bfloat16 rounds a product by less


@dataclass(frozen=True)
class Scaling:
    """feature_k = slope_k · output_k, where output = the producer's own at `rows`, and no slope depends on it.

    path: of the producer, an `nn.Linear`.
    """

    path: str
    rows: slice

    def output(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """(…, K) what the producer puts out at its rows."""
        linear = linear_at(model, self.path)
        return functional.linear(inputs, linear.weight, linear.bias)[..., self.rows]


def with_ones(output: Tensor, rows: slice) -> Tensor:
    """A producer's output with ones at its rows: what comes of them are the slopes."""
    output = output.clone()
    output[..., rows] = 1
    return output


def find_scalings(model: nn.Module, producers: Mapping[str, Sequence[str]], tokens: Tensor) -> dict[str, Scaling]:
    """consumer → a producer that scales what it reads; consumers without one are left out.

    producers: path of a consumer → paths of its producers.   tokens: (1, S) for a pass with each candidate. In that
    pass the candidate puts out ones, and the consumer reads the features that it would have read.
    """
    features: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def note(path: str, values: dict[str, Tensor], value: Tensor) -> None:
        calls[path] += 1
        values[path] = value

    with _hooked(
        model,
        {path: lambda value, path=path: note(path, features, value) for path in producers},
        {path: lambda value, path=path: note(path, outputs, value) for own in producers.values() for path in own},
    ):
        _run(model, tokens)
    candidates = {
        path: [
            Scaling(producer, rows)
            for producer in own
            if calls[producer] == 1
            for rows in _rows(outputs[producer].shape[-1], features[path].shape[-1])
        ]
        for path, own in producers.items()
        if calls[path] == 1
    }
    found: dict[str, Scaling] = {}
    for number in range(max(map(len, candidates.values()), default=0)):
        tried = {path: own[number] for path, own in candidates.items() if number < len(own) and path not in found}

        def read(slopes: Tensor, path: str, one: Scaling) -> Tensor:
            if _explains(slopes * outputs[one.path][..., one.rows], features[path]):
                found[path] = one
            return features[path]

        with _hooked(
            model,
            {path: lambda value, path=path, one=one: read(value, path, one) for path, one in tried.items()},
            {one.path: lambda value, rows=one.rows: with_ones(value, rows) for one in tried.values()},
        ):
            _run(model, tokens)
    return found


def _rows(outputs: int, features: int) -> list[slice]:
    """Places that as many outputs as there are features may have in a matrix: side by side, or taking turns."""
    parts, rest = divmod(outputs, features)
    if rest:
        return []
    if parts == 1:
        return [slice(None)]
    return [slice(number * features, (number + 1) * features) for number in range(parts)] + [
        slice(number, None, parts) for number in range(parts)
    ]


def _explains(product: Tensor, features: Tensor) -> bool:
    if product.shape != features.shape:
        return False
    size = features.float().norm()
    return bool(size > 0) and float((product.float() - features.float()).norm() / size) < UNEXPLAINED


def _run(model: nn.Module, tokens: Tensor) -> None:
    with torch.no_grad():
        forward_logits(model, tokens)


@contextmanager
def _hooked(
    model: nn.Module,
    consumers: Mapping[str, Callable[[Tensor], Tensor | None]],
    producers: Mapping[str, Callable[[Tensor], Tensor | None]],
) -> Iterator[None]:
    """What consumers are given and producers put out is shown to these, and replaced by what they return."""

    def before(shown: Callable[[Tensor], Tensor | None]) -> Callable[[nn.Module, tuple], Tensor | None]:
        return lambda _, args: shown(args[0])

    def after(shown: Callable[[Tensor], Tensor | None]) -> Callable[[nn.Module, tuple, Tensor], Tensor | None]:
        return lambda _, args, output: shown(output)

    handles = [model.get_submodule(path).register_forward_pre_hook(before(one)) for path, one in consumers.items()]
    handles += [model.get_submodule(path).register_forward_hook(after(one)) for path, one in producers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
