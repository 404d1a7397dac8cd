"""How a model calls its modules: the arguments seen when the model runs on the meta device."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from modegpt_graph.errors import ModegptError
from modegpt_graph.models import accepts_use_cache, cache_keyword, cache_of, is_cache
from modegpt_graph.trace.fake import fake_cpu, kept_state, on_meta
from modegpt_graph.trace.hints import masks_without_hints
from modegpt_graph.trace.loops import every_branch, with_places_that_are_used
from modegpt_graph.trace.quiet import quiet

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Sizes:
    """Batch, new tokens and cached tokens of one recorded run."""

    batch: int
    tokens: int
    cached: int


@dataclass(frozen=True)
class Call:
    """One call of a module, by parameter name.

    arguments: name → value, tensors replaced by their index into `tensors`, caches by `CACHE`.
    dynamic: per tensor, the axes whose size follows the batch or the number of tokens.
    length: (tensor, axis) whose size is that of all tokens so far, where the call has one.
    cache_layers: the layer numbers under which the call updated the cache, in order.
    positional: names of the arguments that were given by position.
    others: the calls in the same run that give it other constants.
    also: calls with other numbers than the traced ones, where these are `numbers`.
    only_as_seen: whether other constants than these are an error: the code that was traced may have depended on them.
    obstacle: why a trace under this call does not say all that the module does; None where it does.
    """

    arguments: Mapping[str, Any]
    extra: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    dynamic: tuple[tuple[int, ...], ...]
    length: tuple[int, int] | None
    has_cache: bool
    cache_layers: tuple[int, ...] = ()
    positional: tuple[str, ...] = ()
    others: tuple["Call", ...] = ()
    also: tuple["Call", ...] = ()
    only_as_seen: bool = False
    obstacle: str | None = None

    def inputs(self) -> list[tuple[Path, int]]:
        """Where each tensor stands among the arguments: (path, index into `tensors`)."""
        return [(path, leaf.index) for path, leaf in self._leaves() if isinstance(leaf, Slot)]

    def numbers(self) -> list[tuple[Path, int]]:
        """Where each whole number that may be any stands: (path, index of a tensor of that size, which is no input)."""
        inputs = {index for _, index in self.inputs()}
        found = [(path, leaf.index) for path, leaf in self._leaves() if isinstance(leaf, SizeSlot)]
        return [(path, index) for path, index in found if index not in inputs]

    def _leaves(self) -> list[tuple[Path, Any]]:
        leaves, _ = pytree.tree_flatten_with_path(dict(self.arguments), is_leaf=is_leaf)
        return [(tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path), leaf) for path, leaf in leaves]


@dataclass(frozen=True)
class Slot:
    """Place of a tensor among a call's arguments."""

    index: int


@dataclass(frozen=True)
class SizeSlot:
    """Place of a whole number among a call's arguments that is the size of a tensor's axis."""

    index: int
    axis: int


@dataclass(frozen=True)
class CacheSlot:
    """Place of the key/value cache among a call's arguments."""

    cache: Any


def accepted_keywords(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of a module's forward method."""
    return frozenset(inspect.signature(module.forward).parameters)


def is_leaf(value: object) -> bool:
    """Whether a value among arguments is one, whatever it consists of."""
    return isinstance(value, (Slot, SizeSlot, CacheSlot)) or is_cache(value)


@dataclass
class Seen:
    """The arguments of one call, as they were."""

    arguments: dict[str, Any]
    extra: tuple[str, ...]
    tensors: list[Tensor]
    cache_layers: list[int]
    positional: tuple[str, ...]


@contextmanager
def _watched_updates(cache: Any, updated: Callable[[int], None]) -> Iterator[None]:
    """Tell `updated` the layer number of every update of a cache."""
    if cache is None:
        yield
        return

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def update(self: Any, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            updated(layer)
            return original(self, key, value, layer, *args, **kwargs)

        return update

    with ExitStack() as patches:
        # A cache may be made of others, which a module updates by themselves.
        kinds: dict[Any, None] = dict.fromkeys(type(one) for one in (cache, *filter(is_cache, vars(cache).values())))
        for kind in kinds:
            patches.enter_context(patch.object(kind, "update", watched(kind.update)))
        yield


def _recorded(module: nn.Module, args: tuple, kwargs: dict) -> Seen:
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    arguments, extra = {}, ()
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            extra = tuple(value)
            arguments |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            arguments[f"*{name}"] = value
        else:
            arguments[name] = value
    tensors: list[Tensor] = []

    def slot(value: object) -> object:
        if isinstance(value, Tensor):
            tensors.append(value)
            return Slot(len(tensors) - 1)
        return CacheSlot(value) if is_cache(value) else value

    named = [name for name in bound.arguments if not name.startswith("*")][: len(args)]
    positional = tuple(name for name in named if name in arguments)
    return Seen(pytree.tree_map(slot, arguments, is_leaf=is_cache), extra, tensors, [], positional)


def _run(
    model: nn.Module, modules: Mapping[str, nn.Module], sizes: Sizes, example_inputs: tuple | None, keyword: str | None
) -> dict[str, list[Seen]]:
    """Arguments of every call of each module, on the meta device, or on a fake CPU where that is not enough."""
    try:
        return _run_once(model, modules, sizes, example_inputs, lambda value: value, keyword)
    except (RuntimeError, NotImplementedError):
        with fake_cpu(model, data_sizes=True) as fake:
            seen = with_places_that_are_used(
                lambda unused: _run_once(model, modules, sizes, example_inputs, fake, keyword, unused)
            )
        # As many as no other axis has: they differ from run to run, and follow neither batch nor length.
        unknown = sizes.batch * (sizes.tokens + sizes.cached) + 1
        return {
            name: [replace(one, tensors=[on_meta(tensor, unknown) for tensor in one.tensors]) for one in calls]
            for name, calls in seen.items()
        }


def _run_once(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    sizes: Sizes,
    example_inputs: tuple | None,
    fake: Callable[[Tensor], Tensor],
    keyword: str | None,
    unused: int = 0,
) -> dict[str, list[Seen]]:
    """Arguments of every call of each module; the run has a cache with tokens in it, given under `keyword`.

    unused: see `every_branch`.
    """
    seen: dict[str, list[Seen]] = {}
    running: list[str] = []

    def enter(name: str):
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            running.append(name)
            seen.setdefault(name, []).append(_recorded(module, args, kwargs))

        return record

    def leave(*_: object) -> None:
        running.pop()

    def updated(layer: int) -> None:
        for name in running:
            seen[name][0].cache_layers.append(layer)

    def run(count: int, **kwargs: Any) -> Any:
        tokens = torch.zeros(sizes.batch, count, dtype=torch.long, device="meta")
        tokens = fake(tokens)
        rest = () if example_inputs is None else example_inputs[1:]
        with every_branch(unused=unused):
            return model(tokens, *rest, **kwargs)

    handles = []
    try:
        with torch.no_grad():
            accepted = accepted_keywords(model)
            cached: dict[str, Any] = {"use_cache": False} if example_inputs is None and accepts_use_cache(model) else {}
            cache = None if keyword is None else _filled_cache(model, lambda: run(sizes.cached, use_cache=True))
            if keyword is not None and cache is not None:
                total = sizes.cached + sizes.tokens
                cached = {keyword: cache, "use_cache": True}
                if "attention_mask" in accepted:
                    cached["attention_mask"] = fake(torch.ones(sizes.batch, total, dtype=torch.long, device="meta"))
                if "position_ids" in accepted:
                    positions = torch.arange(sizes.cached, total, device="meta")
                    cached["position_ids"] = fake(positions.expand(sizes.batch, -1).contiguous())
            for name, module in modules.items():
                handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
            with _watched_updates(cache, updated):
                run(sizes.tokens, **cached)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _filled_cache(model: nn.Module, run: Callable[[], Any]) -> Any:
    """The cache that a run of the model fills: the one it returns, or else the one it hands to its modules."""
    handed: list[Any] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        handed.extend(value for value in (*args, *kwargs.values()) if is_cache(value))

    handles = [part.register_forward_pre_hook(look, with_kwargs=True) for part in model.modules()]
    try:
        returned = cache_of(run())
    finally:
        for handle in handles:
            handle.remove()
    return returned if returned is not None else next(iter(handed), None)


def _length_axis(
    dynamic: tuple[tuple[int, ...], ...], runs: tuple[list[Tensor], list[Tensor]], sizes: tuple[Sizes, Sizes]
) -> tuple[int, int] | None:
    """(tensor, axis) that is as long as the keys: all tokens so far, or those that a sliding window leaves."""
    axes = [(index, axis) for index, own in enumerate(dynamic) for axis in reversed(own)]

    def lengths(index: int, axis: int) -> tuple[int, ...]:
        return tuple(int(run[index].shape[axis]) for run in runs)

    total = tuple(size.cached + size.tokens for size in sizes)
    known = {tuple(size.batch for size in sizes), tuple(size.tokens for size in sizes)}
    exact = [one for one in axes if lengths(*one) == total]
    windowed = [(index, axis) for index, axis in axes if runs[0][index].ndim == 4 and lengths(index, axis) not in known]
    return next(iter([*exact, *windowed]), None)


SIZES = Sizes(2, 5, 4), Sizes(3, 7, 11)


def record_calls(
    skeleton: nn.Module,
    names: Iterable[str],
    example_inputs: tuple | None = None,
    sizes: tuple[Sizes, Sizes] = SIZES,
) -> dict[str, Call]:
    """How `skeleton` (on the meta device) calls each of its modules `names`.

    The model runs twice, at different sizes; an axis whose size differs between the runs is dynamic. Modules that are
    never called are left out.
    Raises ModegptError where the model cannot be run.
    """
    modules = {name: skeleton.get_submodule(name) for name in names}
    runs, uncached = runs_of(skeleton, modules, sizes, [example_inputs] * len(sizes))
    calls = {}
    for name in modules:
        if not all(name in run for run in runs):
            continue
        first, second = (run[name] for run in runs)
        distinct: dict[object, Call] = {}
        for one, other in zip(first, second, strict=False):
            call = replace(call_of(one, other, sizes), only_as_seen=example_inputs is not None)
            if uncached is not None and _may_be_given_more(modules[name], call.arguments):
                call = replace(call, obstacle=f"the model could only be run without its cache ({uncached})")
            distinct.setdefault(constants_of(one), call)
        main, *others = distinct.values()
        calls[name] = replace(main, others=tuple(others))
    return calls


def _may_be_given_more(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether another call can give a module what this one did not: a cache, or the state of a recurrence."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD or arguments.get(one.name) is None for one in parameters)


def runs_of(
    skeleton: nn.Module, modules: Mapping[str, nn.Module], sizes: Sequence[Sizes], inputs: Sequence[tuple | None]
) -> tuple[list[dict[str, list[Seen]]], str | None]:
    """One run of each size, with its example inputs; why they had no cache, where the model takes one and could not be
    run with it.

    Modules that have nothing to do with the cache are called alike without it.
    """
    keyword = cache_keyword(skeleton) if inputs[0] is None else None
    reason = None
    for tried in dict.fromkeys((keyword, None)):
        try:
            runs = []
            for one, given in zip(sizes, inputs, strict=True):
                with kept_state(skeleton), quiet(), masks_without_hints():
                    runs.append(_run(skeleton, modules, one, given, tried))
            return runs, reason
        except Exception as error:  # a model's own code fails in as many ways as it can be written
            lines = str(error).strip().splitlines()
            reason = reason or f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    raise ModegptError(f"the model could not be run on the meta device, to see how it calls its modules: {reason}")


def constants_of(one: Seen) -> object:
    """What tells calls of one module apart: everything but the values and sizes of tensors."""
    leaves, structure = pytree.tree_flatten(one.arguments, is_leaf=is_leaf)
    tensors = tuple((tensor.ndim, tensor.dtype) for tensor in one.tensors)
    return str(structure), tensors, tuple((type(leaf), plain(leaf)) for leaf in leaves)


def plain(leaf: object) -> object:
    """A constant among arguments: itself where it is a number, a word or None, else its type."""
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf).__name__


def call_of(first: Seen, second: Seen, sizes: tuple[Sizes, Sizes], numbers: Collection[int] = ()) -> Call:
    """One call as it was in two runs. numbers: places among its arguments of whole numbers that may be any."""
    tensors, others = list(first.tensors), list(second.tensors)
    leaves, structure = pytree.tree_flatten(first.arguments, is_leaf=is_leaf)
    obstacle = None
    if pytree.tree_flatten(second.arguments, is_leaf=is_leaf)[1] != structure or len(tensors) != len(others):
        obstacle, others = "the model calls it otherwise when there are more tokens", tensors
    dynamic = tuple(
        tuple(axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis])
        for a, b in zip(tensors, others, strict=True)
    )
    arguments = dict(first.arguments)
    if obstacle is None:
        axes = {
            (int(tensors[index].shape[axis]), int(others[index].shape[axis])): SizeSlot(index, axis)
            for index, own in reversed(list(enumerate(dynamic)))
            for axis in reversed(own)
        }
        again = pytree.tree_leaves(second.arguments, is_leaf=is_leaf)
        for place, (one, other) in enumerate(zip(leaves, again, strict=True)):
            if place in numbers:
                size = SizeSlot(len(tensors), 0)
                tensors.append(torch.empty(one, dtype=torch.long, device="meta"))
                dynamic += ((0,) if one != other else (),)
                leaves[place] = size
                continue
            if (type(one), plain(one)) == (type(other), plain(other)):
                continue
            size = axes.get((one, other)) if type(one) is int and type(other) is int else None
            if size is None:
                obstacle = f"it is given a value that changes with the number of tokens ({one}, then {other})"
            else:
                leaves[place] = size
        arguments = pytree.tree_unflatten(leaves, structure)
    has_cache = any(isinstance(leaf, CacheSlot) for leaf in leaves)
    length = _length_axis(dynamic[: len(others)], (tensors, others), sizes)
    return Call(
        arguments,
        first.extra,
        tuple(tensors),
        dynamic,
        length,
        has_cache,
        tuple(first.cache_layers),
        first.positional,
        obstacle=obstacle,
    )
