"""Fit the consumers of a smaller model again, layer by layer, to what the dense model's stream should have become.

The one-shot solutions are fitted to the inputs that each site has in the dense model. In the smaller model a site reads
what the sites before it have left. So both models go over the calibration tokens side by side; at every consumer the
smaller model's features are fitted to the dense model's output plus all that the residual stream has lost so far, and
the passes go on with the new matrix. Where a producer does nothing but scale the features, as a gated MLP's up
projection, they are linear in it too: it is fitted to what the consumer leaves. Nothing else changes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import Gram
from modegpt_graph.decompose.correction import correction, step_length
from modegpt_graph.decompose.scaled import ScaledRows, scaled_direction, scaled_step_length
from modegpt_graph.models import forward_logits
from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.rewrite.lockstep import SteppedPass, current_pass
from modegpt_graph.rewrite.scaling import Scaling, find_scalings, with_ones
from modegpt_graph.rewrite.stream import Entry, layer_input, row_scales, stream_entries

RIDGE = 0.1  # relative to the mean diagonal; smaller ones follow the calibration text too closely
TOKENS_PER_PASS = 4096
PASSES = (4, 16)  # at least and at most, where there are as many windows
HELD_OUT = 4  # every fourth pass is left out of the fit that finds the length of the step
PROBE_TOKENS = 64
FEATURE_RIDGE, INPUT_RIDGE = 1.0, 0.01  # relative too; they left least of other text's error
SMALLEST_GAIN = 1e-3  # of the largest; what hardly enters the stream is not fitted


@dataclass(frozen=True)
class Producers:
    """Linear modules that a consumer's features come of, and nothing else does; the module with all of them.

    paths: of the producers.   module: path of one in which nothing else has changed.
    """

    paths: Sequence[str]
    module: str


def recalibrate(
    dense: nn.Module,
    smaller: nn.Module,
    layers: Sequence[str],
    consumers: Mapping[str, bool],
    texts: Sequence[Tensor],
    progress: Progress | None = None,
    producers: Mapping[str, Producers] | None = None,
) -> dict[str, float]:
    """Change the weights (and biases) of `smaller`'s consumers in place, and the weights of producers that scale.

    Returns, for consumers of which a producer was fitted, the squared error of what they put out over its squared norm,
    on the inputs that their modules have in the dense model.

    layers: paths of the decoder layers.   consumers: path → whether it may change; those that may not are needed all
    the same, to know what the stream has become.   texts: (windows, window) of calibration text, each.   producers:
    consumer → where its features come from.
    A layer is left as it is where its output is not its input plus what its consumers put out, scaled or not (experts,
    say), for then what the stream has lost is not known there.
    """
    entries = stream_entries(dense, layers, consumers, texts[0][:1, :PROBE_TOKENS])
    wanted = {path for path, may_change in consumers.items() if may_change and path in entries}
    batches = [batch for tokens in texts for batch in _batches(tokens)]
    if not wanted or len(batches) < 2:
        return {}
    sources = {path: own for path, own in (producers or {}).items() if path in wanted}
    scalings = find_scalings(smaller, {path: own.paths for path, own in sources.items()}, texts[0][:1, :PROBE_TOKENS])
    errors: dict[str, float] = {}
    with (
        (progress or NullProgress()).stage("recalibrate", len(wanted)) as stage,
        _recorded(dense, {path: sources[path].module for path in scalings}),
        _hooked(dense, layers, entries, {}, stops_after=wanted),
        _hooked(smaller, layers, entries, scalings, stops_before=wanted),
    ):
        passes = [(_pass(dense, batch), _pass(smaller, batch)) for batch in batches]
        try:
            for _ in wanted:
                paths = {one.advance() for pair in passes for one in pair}
                if len(paths) != 1 or any("stream" not in one.state for pair in passes for one in pair):
                    return errors  # passes that take different ways, or call no layers any more, cannot be compared
                (path,) = paths
                entry = entries[path]
                branch = _Branch(smaller, path, entry)
                targets = [(_target(*pair, entry.constant), pair[1].state["features"]) for pair in passes]
                features = _fit(branch, targets)
                calls = [one.state.pop(("call", path), None) for one, _ in passes]
                if path in scalings and all(calls) and _fit_producer(branch, targets, features, scalings[path]):
                    errors[path] = _error(smaller.get_submodule(sources[path].module), branch.linear, calls)
                stage.advance()
        finally:
            for pair in passes:
                for one in pair:
                    one.abandon()
    return errors


def _batches(tokens: Tensor) -> Sequence[Tensor]:
    fewest, most = PASSES
    count = min(max(tokens.numel() // TOKENS_PER_PASS, fewest), most, len(tokens))
    return tokens.tensor_split(count)


def _pass(model: nn.Module, tokens: Tensor) -> SteppedPass:
    return SteppedPass(lambda: forward_logits(model, tokens))


def _target(dense: SteppedPass, smaller: SteppedPass, constant: float) -> Tensor:
    """What should enter the stream: what does in the dense model, and what the stream has lost before."""
    before, stream, branch = (
        _exact(one) for one in (dense.state["before"], smaller.state["stream"], dense.state["branch"])
    )
    return branch + ((before - stream) / constant).reshape(branch.shape)


def _exact(values: Tensor) -> Tensor:
    """Differences of a stream are small beside it: half precision would lose them."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class _Features:
    """What a consumer is to read: as they are, or slopes that multiply what a producer makes of its inputs."""

    values: Tensor
    inputs: Tensor | None = None
    scaling: Scaling | None = None

    def now(self, model: nn.Module) -> Tensor:
        """(…, K) with the producer's matrix as it is now."""
        if self.scaling is None or self.inputs is None:
            return self.values
        return self.values * self.scaling.output(model, self.inputs)


class _Branch:
    """A consumer of the smaller model, with what stands between it and the stream."""

    def __init__(self, model: nn.Module, path: str, entry: Entry) -> None:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        self.model, self.linear, self._gains = model, linear, entry.gains
        self._follower = None if entry.follower is None else model.get_submodule(entry.follower)

    def left(self, target: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 1) weights of rows, and (T, D) what the weighed features' product with a change of the matrix should be.

        Where a module follows, rows are weighed by what it scales them with, and columns divided by its gains: to first
        order that is the change of what enters the stream.
        """
        output = self.linear(features)
        branch = output if self._follower is None else self._follower(output)
        output, branch, target = (_exact(one).flatten(0, -2) for one in (output, branch, target))
        missing = target - branch
        if self._gains is None:
            return missing.new_ones(len(missing), 1), missing
        gains = self._gains.to(missing.dtype)
        used = gains.abs() > SMALLEST_GAIN * gains.abs().max()
        return row_scales(output, branch, gains), torch.where(used, missing / gains, 0.0)


def _fit(branch: _Branch, passes: Sequence[tuple[Tensor, _Features]]) -> list[Tensor]:
    """Move a matrix towards the least-squares fit of (target, features), as far as held-out passes gain by it.

    Returns the features of each pass.
    """
    linear = branch.linear
    bias = linear.bias is not None
    sums = [_Sums(linear), _Sums(linear)]
    features = [read.now(branch.model) for _, read in passes]
    for number, (target, _) in enumerate(passes):
        weights, missing = branch.left(target, features[number])
        sums[_is_held_out(number)].add(_exact(features[number]).flatten(0, -2) * weights, missing)
    (gram, pull), (other_gram, other_pull) = (one.result() for one in sums)
    tried = correction(gram, pull, ridge=RIDGE, bias=bias)
    length = step_length(other_gram, other_pull, *tried)
    if length:
        change, offset = correction(gram + other_gram, pull + other_pull, ridge=RIDGE, bias=bias)
        linear.weight.data = (linear.weight.double() + length * change.T).to(linear.weight.dtype)
        if linear.bias is not None and offset is not None:
            linear.bias.data = (linear.bias.double() + length * offset).to(linear.bias.dtype)
    return features


def _fit_producer(
    branch: _Branch, passes: Sequence[tuple[Tensor, _Features]], features: Sequence[Tensor], scaling: Scaling
) -> bool:
    """Move a producer that scales the features towards what the consumer leaves, as far as held-out passes gain.

    Returns whether they do.
    """
    rows: tuple[list[ScaledRows], list[ScaledRows]] = [], []
    for number, (target, read) in enumerate(passes):
        assert read.inputs is not None
        weights, missing = branch.left(target, features[number])
        inputs, slopes = (_exact(one).flatten(0, -2) for one in (read.inputs, read.values))
        rows[_is_held_out(number)].append(ScaledRows(inputs, slopes * weights, missing))
    consumer = _exact(branch.linear.weight)
    change = scaled_direction(rows[0], consumer, feature_ridge=FEATURE_RIDGE, input_ridge=INPUT_RIDGE)
    length = scaled_step_length(rows[1], consumer, change)
    if length:
        producer = branch.model.get_submodule(scaling.path)
        assert isinstance(producer, nn.Linear)
        weight = producer.weight.detach().to(change.dtype, copy=True)
        weight[scaling.rows] += length * change
        producer.weight.data = weight.to(producer.weight.dtype)
    return length > 0


@dataclass
class _Call:
    """What a module of the dense model was called with, and what the consumer in it put out."""

    args: tuple
    kwargs: dict
    output: Tensor | None = None


def _error(module: nn.Module, consumer: nn.Linear, calls: Sequence[_Call]) -> float:
    """Of the consumer, in the smaller model's module, when that is called as the dense model's was."""
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
            expected = _exact(call.output)
            lost += float((_exact(found.pop()) - expected).square().sum(dtype=torch.float64))
            size += float(expected.square().sum(dtype=torch.float64))
    finally:
        handle.remove()
    return lost / size if size else 0.0


def _is_held_out(number: int) -> bool:
    return number % HELD_OUT == HELD_OUT - 1


@contextmanager
def _recorded(model: nn.Module, modules: Mapping[str, str]) -> Iterator[None]:
    """Within this context every stepped pass keeps how the modules of consumers are called: consumer → its module."""

    def called(path: str):
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if (own := current_pass()) is not None:
                own.state["call", path] = _Call(args, kwargs)

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


class _Sums:
    """[F, 1]ᵀ[F, 1] and [F, 1]ᵀ R over the rows that are added."""

    def __init__(self, linear: nn.Linear) -> None:
        self._gram = Gram(linear.in_features)
        self._pull = torch.zeros(linear.in_features + 1, linear.out_features, dtype=torch.float64)

    def add(self, features: Tensor, left: Tensor) -> None:
        """features: (T, K).   left: (T, D), R."""
        self._gram.add(features)
        self._pull[:-1] += (features.T @ left).double()
        self._pull[-1] += left.sum(0, dtype=torch.float64)

    def result(self) -> tuple[Tensor, Tensor]:
        return self._gram.augmented(), self._pull


@contextmanager
def _hooked(
    model: nn.Module,
    layers: Sequence[str],
    entries: Mapping[str, Entry],
    scalings: Mapping[str, Scaling],
    *,
    stops_before: Collection[str] = (),
    stops_after: Collection[str] = (),
) -> Iterator[None]:
    """Within this context every stepped pass follows its residual stream, and stops where it is told to.

    stops_before: consumers, before they compute.   stops_after: consumers, when what enters the stream is known.
    """

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if (own := current_pass()) is not None:
            own.state["stream"] = layer_input(args, kwargs)

    def before(path: str):
        def hook(_: nn.Module, args: tuple) -> tuple | None:
            if (own := current_pass()) is None:
                return None
            features = _Features(args[0], own.state.pop(("inputs", path), None), scalings.get(path))
            own.state["features"] = features
            own.stop(path)
            del own.state["features"]
            return features.now(model), *args[1:]

        return hook

    def slopes_of(path: str, scaling: Scaling):
        def hook(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if (own := current_pass()) is None:
                return None
            own.state["inputs", path] = args[0]
            return with_ones(output, scaling.rows)

        return hook

    def after(path: str):
        def hook(_: nn.Module, args: tuple, branch: Tensor) -> None:
            if (own := current_pass()) is not None:
                stream = own.state["stream"]
                own.state |= {"before": stream, "branch": branch}
                if path in stops_after:
                    own.stop(path)
                own.state["stream"] = stream + entries[path].constant * branch.reshape(stream.shape)

        return hook

    handles = []
    try:
        for path, scaling in scalings.items():
            handles.append(model.get_submodule(scaling.path).register_forward_hook(slopes_of(path, scaling)))
        for path in layers:
            handles.append(model.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True))
        for path, entry in entries.items():
            if path in stops_before:
                handles.append(model.get_submodule(path).register_forward_pre_hook(before(path)))
            last = model.get_submodule(entry.follower or path)
            handles.append(last.register_forward_hook(after(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()
