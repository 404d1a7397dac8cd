"""Fit the consumers of a smaller model again, layer by layer, to what the dense model's stream should have become.

The one-shot solutions are fitted to the inputs that each site has in the dense model. In the smaller model a site reads
what the sites before it have left. So both models go over the calibration tokens side by side; at every consumer the
smaller model's features are fitted to the dense model's output plus all that the residual stream has lost so far, and
the passes go on with the new matrix. Where a producer does nothing but scale the features, as a gated MLP's up
projection, they are linear in it too: it is fitted to what the consumer leaves. Where a norm follows, it gives what is
left of a branch the length that all of it had; so its gains are fitted last. At the end the logits get the scale at
which they tell most nearly what the dense model's do. Nothing else changes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from modegpt_graph.calibrate.statistics import Gram, exact
from modegpt_graph.calibrate.stream import (
    PROBE_TOKENS,
    Entry,
    follower_scales,
    layer_input,
    row_scales,
    slopes_of,
    stream_entries,
)
from modegpt_graph.decompose.correction import best_length, correction, step_length
from modegpt_graph.decompose.scaled import ScaledRows, scaled_direction, scaled_step_length
from modegpt_graph.models import forward_logits
from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.rewrite.linears import linear_at
from modegpt_graph.rewrite.lockstep import SteppedPass, current_pass
from modegpt_graph.rewrite.logit_scale import STEP, find_logit_scale
from modegpt_graph.rewrite.recorded import error_when_called, recorded, taken
from modegpt_graph.rewrite.scaling import Scaling, find_scalings, with_ones

HELD_BACK = 376  # tokens, as if each feature had come alone in so many, with nothing to correct; 0.01 of 37,632
TOKENS_PER_PASS = 4096
PASSES = (4, 16)  # at least and at most, where there are as many windows
HELD_OUT = 4  # every fourth pass is left out of the fit that finds the length of the step
ERROR_TOKENS = 8192  # on which errors are measured, about: on all of a long text that takes a quarter of a pass over it
FEATURE_RIDGE, INPUT_RIDGE = 1.0, 0.01  # relative to mean diagonals; they left least of other text's error
SMALLEST_GAIN = 1e-3  # of the largest; what hardly enters the stream is not fitted


@dataclass
class Recalibration:
    """What was fitted.

    consumers: that were changed.   producers: consumer → the one of its producers that was.   norms: how many were.
    errors: for the consumers of these producers, the squared error of what they put out over its squared norm, on the
    inputs that their modules have in the dense model; of a long text on passes from all over it.   logit_scale: None
    where it could not be fitted.
    """

    consumers: set[str] = field(default_factory=set)
    producers: dict[str, str] = field(default_factory=dict)
    norms: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    logit_scale: float | None = None


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
    weighs_tokens: bool = True,
) -> Recalibration:
    """Change the weights (and biases) of `smaller`'s consumers in place, of producers that scale, and of norms after.

    layers: paths of the decoder layers.   consumers: path → whether it may change; those that may not are needed all
    the same, to know what the stream has become.   texts: (windows, window) of calibration text, each.   producers:
    consumer → where its features come from.   weighs_tokens: whether tokens count in errors as a norm that follows a
    consumer scales what that puts out; fits are of what enters the stream all the same.
    A layer is left as it is where its output is not its input plus what its consumers put out, scaled or not (experts,
    say), for then what the stream has lost is not known there.
    """
    entries = stream_entries(dense, layers, consumers, texts[0][:1, :PROBE_TOKENS])
    wanted = {path for path, may_change in consumers.items() if may_change and path in entries}
    batches = [batch for tokens in texts for batch in _batches(tokens)]
    found = Recalibration()
    if not wanted or len(batches) < 2:
        return found
    sources = {path: own for path, own in (producers or {}).items() if path in wanted}
    scalings = find_scalings(smaller, {path: own.paths for path, own in sources.items()}, texts[0][:1, :PROBE_TOKENS])
    tokens = sum(batch.numel() for batch in batches)
    ridge, stride = HELD_BACK / tokens, max(tokens // ERROR_TOKENS, 1)
    scale = find_logit_scale(smaller, layers, texts[0][:1, :PROBE_TOKENS], texts)
    with (
        (progress or NullProgress()).stage("recalibrate", len(wanted)) as stage,
        recorded(dense, {path: sources[path].module for path in scalings}),
        _hooked(dense, layers, entries, {}, stops_after=wanted),
        _hooked(smaller, layers, entries, scalings, stops_before=wanted),
        scale.hooked(dense) if scale else nullcontext(),
        scale.hooked(smaller, (1.0, 1.0 + STEP)) if scale else nullcontext(),
    ):
        passes = [(_pass(dense, batch), _pass(smaller, batch)) for batch in batches]
        try:
            for _ in wanted:
                paths = {one.advance() for pair in passes for one in pair}
                if len(paths) != 1 or any("stream" not in one.state for pair in passes for one in pair):
                    return found  # passes that go different ways, or call no layers, tell nothing
                (path,) = paths
                entry = entries[path]
                branch = _Branch(smaller, path, entry)
                targets = [(_target(*pair, entry), pair[1].state["features"]) for pair in passes]
                if _fit(branch, targets, ridge):
                    found.consumers.add(path)
                calls = [call for one, _ in passes if (call := taken(one, path)) is not None]
                known = path in scalings and len(calls) == len(passes)
                if known and _fit_producer(branch, targets, scalings[path]):
                    found.producers[path] = scalings[path].path
                    module = smaller.get_submodule(sources[path].module)
                    scales = partial(follower_scales, dense, entry) if weighs_tokens and entry.is_normed else None
                    found.errors[path] = error_when_called(module, branch.linear, calls[::stride], scales)
                if entry.parameter is not None:
                    found.norms += _fit_gains(branch, entry.parameter, targets, ridge)
                stage.advance()
            found.logit_scale = scale and scale.fit(smaller, passes)
            return found
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


def _target(dense: SteppedPass, smaller: SteppedPass, entry: Entry) -> Tensor:
    """What should enter the stream: what does in the dense model, and what the stream has lost before."""
    branch = exact(dense.state["branch"])
    lost = exact(dense.state["before"]) - exact(smaller.state["stream"])
    return branch + (lost / entry.constant).reshape(branch.shape)


@dataclass
class _Features:
    """What a consumer is to read, (…, K).

    scaled: where a producer scales it, what multiplies that producer's output, and what the producer reads.
    """

    values: Tensor
    scaled: tuple[Tensor, Tensor] | None = None


class _Branch:
    """A consumer of the smaller model, with what stands between it and the stream."""

    def __init__(self, model: nn.Module, path: str, entry: Entry) -> None:
        self.model, self.linear = model, linear_at(model, path)
        self._gains, self._is_normed = entry.gains, entry.is_normed
        self.follower = None if entry.follower is None else model.get_submodule(entry.follower)

    @property
    def matrix(self) -> Tensor:
        """(K + 1, D) the weights, and the bias below them."""
        weight, bias = self.linear.weight.double(), self.linear.bias
        return torch.cat([weight.T, weight.new_zeros(1, len(weight)) if bias is None else bias.double()[None]])

    @property
    def is_last(self) -> bool:
        """Whether no module follows."""
        return self._gains is None

    def left(self, target: Tensor, features: Tensor) -> tuple[Tensor | None, Tensor]:
        """(T, 1) weights of rows, and (T, D) what the weighed features' product with a change of the matrix should be.

        Where a module follows, rows are weighed by what it scales them with, and columns divided by its gains: to first
        order that is the change of what enters the stream. A norm takes no notice of changes along its row. Where none
        does, all rows weigh the same, and the weights are None.
        """
        output = self.linear(features)
        branch = output if self.follower is None else self.follower(output)
        output, branch, target = (exact(one).flatten(0, -2) for one in (output, branch, target))
        missing = target - branch
        if self._gains is None:
            return None, missing
        gains = self._gains.to(missing.dtype)
        used = gains.abs() > SMALLEST_GAIN * gains.abs().max()
        left = torch.where(used, missing / gains, 0.0)
        if self._is_normed:
            directions = functional.normalize(output, dim=-1)
            left = left - directions * (directions * left).sum(-1, keepdim=True)
        return row_scales(output, branch, gains), left


def _fit(branch: _Branch, passes: Sequence[tuple[Tensor, _Features]], ridge: float) -> bool:
    """Move a matrix towards the least-squares fit of (target, features), as far as held-out passes gain by it.

    Returns whether they do.
    """
    linear = branch.linear
    bias = linear.bias is not None
    sums = [_Sums(branch), _Sums(branch)]
    for number, (target, features) in enumerate(passes):
        sums[_is_held_out(number)].add(target, features.values)
    (gram, pull), (other_gram, other_pull) = (one.result() for one in sums)
    tried = correction(gram, pull, ridge=ridge, bias=bias)
    length = step_length(other_gram, other_pull, *tried)
    if length:
        change, offset = correction(gram + other_gram, pull + other_pull, ridge=ridge, bias=bias)
        linear.weight.data = (linear.weight.double() + length * change.T).to(linear.weight.dtype)
        if linear.bias is not None and offset is not None:
            linear.bias.data = (linear.bias.double() + length * offset).to(linear.bias.dtype)
    return length > 0


def _fit_producer(branch: _Branch, passes: Sequence[tuple[Tensor, _Features]], scaling: Scaling) -> bool:
    """Move a producer that scales the features towards what the consumer leaves, as far as held-out passes gain.

    Returns whether they do.
    """
    rows: tuple[list[ScaledRows], list[ScaledRows]] = [], []
    for number, (target, features) in enumerate(passes):
        assert features.scaled is not None
        weights, missing = branch.left(target, features.values)
        slopes, inputs = (exact(one).flatten(0, -2) for one in features.scaled)
        slopes = slopes if weights is None else slopes * weights
        rows[_is_held_out(number)].append(ScaledRows(inputs, slopes, missing))
    consumer = exact(branch.linear.weight)
    change = scaled_direction(rows[0], consumer, feature_ridge=FEATURE_RIDGE, input_ridge=INPUT_RIDGE)
    length = scaled_step_length(rows[1], consumer, change)
    if length:
        producer = linear_at(branch.model, scaling.path)
        weight = producer.weight.detach().to(change.dtype, copy=True)
        weight[scaling.rows] += length * change
        producer.weight.data = weight.to(producer.weight.dtype)
        for _, features in passes:
            assert features.scaled is not None
            slopes, inputs = features.scaled
            features.values = slopes * scaling.output(branch.model, inputs)
    return length > 0


def _fit_gains(branch: _Branch, name: str, passes: Sequence[tuple[Tensor, _Features]], ridge: float) -> bool:
    """Move the gains of a norm, column by column, as `_fit` moves a matrix.

    name: of the norm's parameter.
    """
    norm = branch.follower
    assert norm is not None
    gains = norm.get_parameter(name)
    energy, pull = torch.zeros(2, 2, len(gains), dtype=torch.float64)
    for number, (target, features) in enumerate(passes):
        output = branch.linear(features.values)
        slopes, missing = exact(slopes_of(norm, name, output)), target - exact(norm(output))
        energy[_is_held_out(number)] += slopes.square().flatten(0, -2).sum(0)
        pull[_is_held_out(number)] += (slopes * missing).flatten(0, -2).sum(0)
    held_back = (1 + ridge) * energy.clamp_min(torch.finfo(energy.dtype).tiny)
    tried = pull[0] / held_back[0]
    gained, spent = float((tried * pull[1]).sum()), float((tried.square() * energy[1]).sum())
    length = min(best_length(gained, spent), 1.0)
    if length:
        gains.data = (gains.double() + length * pull.sum(0) / held_back.sum(0)).to(gains.dtype)
    return length > 0


def _is_held_out(number: int) -> bool:
    return number % HELD_OUT == HELD_OUT - 1


class _Sums:
    """[F, 1]ᵀ[F, 1] and [F, 1]ᵀ R over the rows that are added, R being what a branch leaves."""

    def __init__(self, branch: _Branch) -> None:
        self._branch = branch
        self._gram = Gram(branch.linear.in_features)
        self._pull = torch.zeros(branch.linear.in_features + 1, branch.linear.out_features, dtype=torch.float64)

    def add(self, target: Tensor, values: Tensor) -> None:
        """target: (…, D).   values: (…, K), F."""
        features = exact(values).flatten(0, -2)
        weights, wanted = (
            (None, exact(target).flatten(0, -2)) if self._branch.is_last else self._branch.left(target, values)
        )
        features = features if weights is None else features * weights
        self._gram.add(features)
        self._pull[:-1] += (features.T @ wanted).double()
        self._pull[-1] += wanted.sum(0, dtype=torch.float64)

    def result(self) -> tuple[Tensor, Tensor]:
        """Where nothing follows, what the branch puts out is in the Gram matrix."""
        gram = self._gram.augmented()
        return gram, self._pull - gram @ self._branch.matrix if self._branch.is_last else self._pull


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
            features = _Features(args[0])
            if ("scaled", path) in own.state:
                inputs, output = own.state.pop(("scaled", path))
                features = _Features(args[0] * output, (args[0], inputs))
            own.state["features"] = features
            own.stop(path)
            del own.state["features"]
            return features.values, *args[1:]

        return hook

    def slopes_of(path: str, scaling: Scaling):
        def hook(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if (own := current_pass()) is None:
                return None
            own.state["scaled", path] = args[0], output[..., scaling.rows]
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
