"""Fit the consumers of a smaller model again, layer by layer, to what the dense model's stream should have become.

The one-shot solutions are fitted to the inputs that each site has in the dense model. In the smaller model a site reads
what the sites before it have left. So both models go over the calibration tokens side by side; at every consumer the
smaller model's features are fitted to the dense model's output plus all that the residual stream has lost so far, and
the passes go on with the new matrix. Nothing but the consumers changes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import Gram
from modegpt_graph.decompose.correction import correction, step_length
from modegpt_graph.models import forward_logits
from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.rewrite.lockstep import SteppedPass, current_pass

RIDGE = 0.1  # relative to the mean diagonal; smaller ones follow the calibration text too closely
TOKENS_PER_PASS = 4096
PASSES = (4, 16)  # at least and at most, where there are as many windows
HELD_OUT = 4  # every fourth pass is left out of the fit that finds the length of the step
PROBE_TOKENS = 64
ADDITIVE = 0.02  # of a layer's change; bfloat16 rounds a sum of a few terms by less


def recalibrate(
    dense: nn.Module,
    smaller: nn.Module,
    layers: Sequence[str],
    consumers: Mapping[str, bool],
    tokens: Tensor,
    progress: Progress | None = None,
) -> None:
    """Change the weights (and biases) of `smaller`'s consumers in place.

    layers: paths of the decoder layers.   consumers: path → whether it may change; those that may not are needed all
    the same, to know what the stream has become.   tokens: (windows, window) of calibration text.
    A layer is left as it is where its output is not its input plus multiples of what its consumers put out (norms
    after them, experts), for then the loss of the stream is not known there.
    """
    shares = stream_shares(dense, layers, consumers, tokens[:1, :PROBE_TOKENS])
    wanted = [path for path, may_change in consumers.items() if may_change and path in shares]
    if not wanted or len(tokens) < 2:
        return
    batches = _batches(tokens)
    with (
        (progress or NullProgress()).stage("recalibrate", len(wanted)) as stage,
        _hooked(dense, layers, shares, stops_after=set(wanted)),
        _hooked(smaller, layers, shares, stops_before=set(wanted)),
    ):
        passes = [(_pass(dense, batch), _pass(smaller, batch)) for batch in batches]
        try:
            for _ in wanted:
                paths = {one.advance() for pair in passes for one in pair}
                if len(paths) != 1:
                    return  # passes that take different ways through the model cannot be compared
                (path,) = paths
                linear = smaller.get_submodule(path)
                assert isinstance(linear, nn.Linear)
                _fit(linear, [(_target(*pair, shares[path]), pair[1].state["features"]) for pair in passes])
                stage.advance()
        finally:
            for pair in passes:
                for one in pair:
                    one.abandon()


def _batches(tokens: Tensor) -> Sequence[Tensor]:
    fewest, most = PASSES
    count = min(max(tokens.numel() // TOKENS_PER_PASS, fewest), most, len(tokens))
    return tokens.tensor_split(count)


def _pass(model: nn.Module, tokens: Tensor) -> SteppedPass:
    return SteppedPass(lambda: forward_logits(model, tokens))


def _target(dense: SteppedPass, smaller: SteppedPass, share: float) -> Tensor:
    """What the consumer should put out: the dense one's output, and what the stream has lost before it."""
    lost, output = dense.state["before"] - smaller.state["stream"], dense.state["output"]
    return output + (lost / share).reshape(output.shape)


def _fit(linear: nn.Linear, passes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Move a matrix towards the least-squares fit of (target, features), as far as held-out passes gain by it."""
    bias = linear.bias is not None
    sums = [_Sums(linear), _Sums(linear)]
    for number, (target, features) in enumerate(passes):
        sums[number % HELD_OUT == HELD_OUT - 1].add(target, features)
    (gram, pull), (other_gram, other_pull) = (one.result() for one in sums)
    tried = correction(gram, pull, ridge=RIDGE, bias=bias)
    length = step_length(other_gram, other_pull, *tried)
    if not length:
        return
    change, offset = correction(gram + other_gram, pull + other_pull, ridge=RIDGE, bias=bias)
    linear.weight.data = (linear.weight.double() + length * change.T).to(linear.weight.dtype)
    if linear.bias is not None and offset is not None:
        linear.bias.data = (linear.bias.double() + length * offset).to(linear.bias.dtype)


class _Sums:
    """[F, 1]ᵀ[F, 1] and [F, 1]ᵀ(target − F W − b) over the rows that are added."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear, self._gram = linear, Gram(linear.in_features)
        self._pull = torch.zeros(linear.in_features + 1, linear.out_features, dtype=torch.float64)

    def add(self, target: Tensor, features: Tensor) -> None:
        left = (target - self._linear(features)).flatten(0, -2).to(_exact(features))
        features = features.flatten(0, -2).to(_exact(features))
        self._gram.add(features)
        self._pull[:-1] += (features.T @ left).double()
        self._pull[-1] += left.sum(0, dtype=torch.float64)

    def result(self) -> tuple[Tensor, Tensor]:
        return self._gram.augmented(), self._pull


def _exact(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


@contextmanager
def _hooked(
    model: nn.Module,
    layers: Sequence[str],
    shares: Mapping[str, float],
    *,
    stops_before: set[str] = frozenset(),  # type: ignore[assignment]
    stops_after: set[str] = frozenset(),  # type: ignore[assignment]
) -> Iterator[None]:
    """Within this context every stepped pass follows its residual stream and stops at the consumers that are named."""

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if (own := current_pass()) is not None:
            own.state["stream"] = layer_input(args, kwargs)

    def before(path: str):
        def hook(_: nn.Module, args: tuple) -> None:
            if (own := current_pass()) is not None:
                own.state["features"] = args[0]
                own.stop(path)
                del own.state["features"]

        return hook

    def after(path: str):
        def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
            if (own := current_pass()) is not None:
                own.state |= {"before": own.state["stream"], "output": output}
                if path in stops_after:
                    own.stop(path)
                own.state["stream"] = own.state["before"] + shares[path] * output.reshape(own.state["before"].shape)

        return hook

    handles = []
    try:
        for path in layers:
            handles.append(model.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True))
        for path in shares:
            if path in stops_before:
                handles.append(model.get_submodule(path).register_forward_pre_hook(before(path)))
            handles.append(model.get_submodule(path).register_forward_hook(after(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_input(args: tuple, kwargs: dict) -> Tensor | None:
    """The hidden states that a layer was called with: the first tensor among its arguments."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


@dataclass
class _Layer:
    """What one layer was given, what its consumers put out, and what came of it."""

    given: Tensor | None = None
    outputs: list[tuple[str, Tensor]] | None = None
    result: Tensor | None = None


def stream_shares(
    model: nn.Module, layers: Sequence[str], consumers: Mapping[str, bool], tokens: Tensor
) -> dict[str, float]:
    """consumer → the constant c_j by which its output enters the stream, in layers where x_out = x_in + Σ c_j output_j.

    Found by least squares over one short pass, and taken where it leaves nothing of the layer's change. In execution
    order. Consumers that are called never or more than once have none.
    """
    seen, running = {path: _Layer(outputs=[]) for path in layers}, []

    def enter(path: str):
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[path].given = layer_input(args, kwargs)
            running.append(path)

        return hook

    def leave(path: str):
        def hook(_: nn.Module, args: tuple, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[path].result = first if isinstance(first, Tensor) else None
            running.remove(path)

        return hook

    def consumed(path: str):
        def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
            if running:
                outputs = seen[running[-1]].outputs
                assert outputs is not None
                outputs.append((path, output))

        return hook

    handles = []
    try:
        for path in layers:
            layer = model.get_submodule(path)
            handles.append(layer.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(layer.register_forward_hook(leave(path)))
        for path in consumers:
            handles.append(model.get_submodule(path).register_forward_hook(consumed(path)))
        with torch.no_grad():
            forward_logits(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    calls = Counter(path for layer in seen.values() for path, _ in layer.outputs or ())
    shares: dict[str, float] = {}
    for layer in seen.values():
        if all(calls[path] == 1 for path, _ in layer.outputs or ()):
            shares |= _shares_of(layer)
    return shares


def _shares_of(layer: _Layer) -> dict[str, float]:
    given, outputs, result = layer.given, layer.outputs or [], layer.result
    paths = [path for path, _ in outputs]
    if given is None or result is None or not outputs:
        return {}
    if any(value.numel() != given.numel() for value in (result, *(output for _, output in outputs))):
        return {}
    change = (result.double() - given.double()).flatten()
    terms = torch.stack([output.double().flatten() for _, output in outputs], dim=1)  # (T·D, m)
    found = torch.linalg.lstsq(terms, change[:, None]).solution[:, 0]
    left = float((change - terms @ found).norm() / change.norm().clamp_min(1e-300))
    if left > ADDITIVE or float(found.abs().min()) < ADDITIVE:
        return {}
    return dict(zip(paths, found.tolist(), strict=True))
