"""SliceGPT: the residual stream in the basis of its principal components, the last of them sliced off.

Where norms are RMS norms without a scale, an orthogonal basis of the stream changes nothing: it is folded into the
matrices that read the stream and into those that are added to it. Each norm sees the stream in a basis of its own, so
the stream is turned from one basis into the next where it is added to, by an adapter that counts as parameters.
Embedding and output matrix are outside of the decoder layers: there the basis is put in front and behind instead.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import exact
from modegpt_graph.errors import InputError
from modegpt_graph.methods.common import Pass, Setting, Smaller, check_runs
from modegpt_graph.methods.inputs import Place, observe, unchanged
from modegpt_graph.methods.matrices import MatrixModule, linear_of
from modegpt_graph.methods.stream import Stream, find_stream


def slicegpt(setting: Setting) -> Pass:
    """Keep as many principal components of the stream as the ratio leaves, the adapters counted.

    Source: SliceGPT (arXiv 2401.15024): theorem 1, section 3.3 for the bases (of the dense model's stream, one shot),
    section 3.4 for slicing; layer norms are made RMS norms by centring (section 3.2).
    """
    stream = find_stream(setting)
    bases = principal_components(setting, stream)

    def at(ratio: float) -> Smaller:
        target = ratio * setting.total
        removed = [removed_at(setting, stream, rank) for rank in range(1, stream.width + 1)]
        if max(removed) < target:
            raise InputError(f"ratio {ratio:g} cannot be met: slicing gives at most {max(removed) / setting.total:.3f}")
        rank = min(range(1, stream.width + 1), key=lambda rank: abs(removed[rank - 1] - target))
        return Smaller(sliced(setting, stream, bases, rank), removed[rank - 1])

    return at


def principal_components(setting: Setting, stream: Stream) -> list[Tensor]:
    """(D, D) orthonormal bases of the stream, the strongest directions first: one a step, and one for its end.

    A point that nothing reads has the basis of the next point that is read.
    """
    places = {str(index): Place(step.readers[0].path) for index, step in enumerate(stream.steps) if step.readers}
    end = str(len(stream.steps))
    places[end] = Place(setting.layers[-1], output=True)

    def centred(rows: Tensor) -> Tensor:
        return rows - rows.mean(1, keepdim=True)

    # The authors' code takes what norms read, where the paper's text has what they return: with that, which makes all
    # tokens alike, perplexity at 20 % was twice as high on the demo model.
    seen = observe(setting, places, "observe the residual stream", centred if stream.centred else unchanged)
    bases: list[Tensor] = []
    for index in reversed(range(len(stream.steps) + 1)):
        if str(index) in seen:
            bases.append(torch.linalg.eigh(seen[str(index)].gram[:-1, :-1]).eigenvectors.flip(1))
        else:
            bases.append(bases[-1])
    return bases[::-1]


def sliced(setting: Setting, stream: Stream, bases: list[Tensor], rank: int) -> nn.Module:
    """The dense model with `rank` of the stream's directions left between its first and its last decoder layer."""
    model = copy.deepcopy(setting.dense)
    matrices: dict[str, _Folded] = {}

    def folded(one: MatrixModule) -> _Folded:
        return matrices.setdefault(one.weight, _Folded.of(one, model))

    for step, here, there in zip(stream.steps, bases[:-1], bases[1:], strict=True):
        here, there = here[:, :rank], there[:, :rank]
        norms = []
        for reader in step.readers:
            norms.append(SlicedNorm(stream.width, reader.norm.epsilon))
            _put(model, reader.path, norms[-1])
            for one in reader.matrices:
                folded(one).read(reader.norm.scale, reader.norm.shift, here)
        for one in step.writers:
            folded(one).write(there, centred=stream.centred)
        if step.carrier is not None:
            carrier, factor = step.carrier
            turn = here.T @ there - torch.eye(rank, dtype=torch.float64)
            folded(carrier).adapter = (turn / factor, norms[0])
    for one in matrices.values():
        _put(model, one.place.path, one.module())
    dtype = next(model.parameters()).dtype
    first, last = (model.get_submodule(setting.layers[index]) for index in (0, -1))
    first.register_forward_pre_hook(_entering(bases[0][:, :rank].to(dtype), stream.centred), with_kwargs=True)
    last.register_forward_hook(_leaving(bases[-1][:, :rank].T.to(dtype)))
    check_runs(model, setting)
    return model


class SlicedNorm(nn.Module):
    """z / sqrt(‖z‖² / D + ε): the RMS norm of the whole stream from what is left of it. `seen` is its last input."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.width, self.epsilon = width, epsilon
        self.seen: Tensor | None = None

    def forward(self, stream: Tensor) -> Tensor:
        """(…, k) to (…, k)."""
        self.seen = stream
        wide = exact(stream)
        return (wide * (wide.square().sum(-1, keepdim=True) / self.width + self.epsilon).rsqrt()).to(stream.dtype)


class Carrier(nn.Module):
    """A matrix whose output is added to the stream, and with it what turns the stream into its next basis.

    The layer's own code adds the stream unturned, and may multiply what is added to it by a number, c: with A the turn,
    the adapter is (A − I) / c.
    """

    def __init__(self, inner: nn.Linear, adapter: Tensor, norm: SlicedNorm) -> None:
        super().__init__()
        self.inner = inner
        self.adapter = nn.Parameter(adapter.to(inner.weight.dtype), requires_grad=False)
        self._norm = (norm,)  # in a tuple: it is a module of another place, not a part of this one

    def forward(self, features: Tensor) -> Tensor:
        """(…, N) to (…, k)."""
        stream = self._norm[0].seen
        assert stream is not None
        added = self.inner(features)
        return added + (stream @ self.adapter).reshape(added.shape)


@dataclass
class _Folded:
    """A matrix (out, in) on its way into other bases."""

    place: MatrixModule
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    adapter: tuple[Tensor, SlicedNorm] | None = field(default=None)

    @staticmethod
    def of(one: MatrixModule, model: nn.Module) -> "_Folded":
        weight, bias = one.matrix(model), one.offset(model)
        return _Folded(one, weight.double(), None if bias is None else bias.double(), weight.dtype)

    def read(self, scale: Tensor, shift: Tensor, basis: Tensor) -> None:
        """Read the bare normed stream in a basis: scale and shift of the norm become the matrix's."""
        if bool(shift.any()):
            moved = self.weight @ shift
            self.bias = moved if self.bias is None else self.bias + moved
        self.weight = (self.weight * scale) @ basis

    def write(self, basis: Tensor, *, centred: bool) -> None:
        """Write into the stream in a basis."""
        if centred:
            self.weight = self.weight - self.weight.mean(0)
            self.bias = None if self.bias is None else self.bias - self.bias.mean()
        self.weight = basis.T @ self.weight
        self.bias = None if self.bias is None else basis.T @ self.bias

    def module(self) -> nn.Module:
        """What takes the matrix's place."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        linear = linear_of(self.weight.to(self.dtype), bias)
        return linear if self.adapter is None else Carrier(linear, *self.adapter)


def removed_at(setting: Setting, stream: Stream, rank: int) -> int:
    """Matrix parameters that go at this rank, less the adapters'."""
    reading = {one.weight: one for step in stream.steps for reader in step.readers for one in reader.matrices}
    writing = {one.weight: one for step in stream.steps for one in step.writers}
    removed = 0
    for name, one in (reading | writing).items():
        rows, columns = one.matrix(setting.dense).shape
        removed += rows * columns - (rank if name in writing else rows) * (rank if name in reading else columns)
    return removed - rank * rank * sum(step.carrier is not None for step in stream.steps)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.train(model.training))


def _entering(basis: Tensor, centred: bool) -> Callable[..., Any]:
    def turn(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def turned(stream: Tensor) -> Tensor:
            return (stream - stream.mean(-1, keepdim=True) if centred else stream) @ basis

        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                return (*args[:place], turned(value), *args[place + 1 :]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, kwargs | {name: turned(kwargs[name])}

    return turn


def _leaving(basis: Tensor) -> Callable[..., Any]:
    def turn(_: nn.Module, args: tuple, output: Any) -> Any:
        return (output[0] @ basis, *output[1:]) if isinstance(output, tuple) else output @ basis

    return turn
