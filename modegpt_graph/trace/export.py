"""A module, called as its model calls it, as one FX graph of ATen operations with the opaque calls in place."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind

from modegpt_graph.errors import ModegptError
from modegpt_graph.trace.branches import watched_branches
from modegpt_graph.trace.calls import CacheSlot, Call, SizeSlot, Slot
from modegpt_graph.trace.contractions import add_biases_first, spell_einsums
from modegpt_graph.trace.fake import fake_cpu, kept_tensors
from modegpt_graph.trace.filled import join_filled
from modegpt_graph.trace.grouped import group_experts
from modegpt_graph.trace.hints import masks_without_hints
from modegpt_graph.trace.left import drop_self_copies, kept_in_place, take_left, unset
from modegpt_graph.trace.loops import every_branch, with_places_that_are_used
from modegpt_graph.trace.opaque import AttentionCall, AttentionWeights, CacheCall, Recorder, TracedCache, opaque_calls
from modegpt_graph.trace.operations import Effect, effect
from modegpt_graph.trace.quiet import quiet
from modegpt_graph.trace.spelling import merge_equal, spell_out
from modegpt_graph.trace.stores import drop_copies, name_stores


class TraceError(ModegptError):
    """torch.export could not trace a module."""


@dataclass(frozen=True)
class Output:
    """Place of the n-th tensor that a traced module returns."""

    index: int


@dataclass(frozen=True)
class Trace:
    """One traced module.

    graph: FX graph over ATen operations; every placeholder is in exactly one of the three mappings below.
    inputs: placeholder → index into `call.tensors`.   state: placeholder → name of the parameter, buffer or other
    tensor that the module keeps.
    constants: placeholder → tensor made while tracing.
    output: what the module returns, tensors replaced by `Output`; `AttentionWeights` where an opaque call's stand.
    assumes_all: whether it stands for the module only where a mask meets everything (`loops`).
    unset: paths of what is None within the module and stays so, although its code asks for it.
    branches: where the module's code asked how large a dynamic axis is ("file.py:12"): other sizes may go another way.
    """

    module: nn.Module
    call: Call
    graph: fx.Graph
    inputs: Mapping[str, int]
    state: Mapping[str, str]
    constants: Mapping[str, Tensor]
    calls: Sequence[AttentionCall | CacheCall]
    output: Any
    assumes_all: bool = False
    branches: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()


class _Called(nn.Module):
    """A module with everything but the tensors of its call filled in."""

    def __init__(self, module: nn.Module, call: Call, recorder: Recorder, unused: int) -> None:
        super().__init__()
        self.module, self.call, self.recorder, self.unused = module, call, recorder, unused

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        call = self.call

        def fill(leaf: object) -> object:
            if isinstance(leaf, Slot):
                return tensors[leaf.index]
            if isinstance(leaf, SizeSlot):
                return tensors[leaf.index].shape[leaf.axis]
            if isinstance(leaf, CacheSlot):
                length = None if call.length is None else tensors[call.length[0]].shape[call.length[1]]
                return TracedCache(leaf.cache, self.recorder, length)
            return leaf

        arguments = pytree.tree_map(
            fill, dict(call.arguments), is_leaf=lambda x: isinstance(x, (Slot, SizeSlot, CacheSlot))
        )
        positional = next((name for name in arguments if name.startswith("*")), None)
        starred = arguments.pop(positional) if positional else ()
        # A method may be wrapped by one that calls its parameters otherwise: what was given by position stays so.
        leading = [arguments.pop(name) for name in call.positional]
        empty = unset(self.module)
        with every_branch(self.recorder.assume_all, self.unused), kept_in_place(self.module) as left:
            output = self.module(*leading, *starred, **arguments)
        returned: list[Tensor] = []

        def place(leaf: object) -> object:
            if isinstance(leaf, Tensor):
                returned.append(leaf)
                return Output(len(returned) - 1)
            return leaf

        self.recorder.output = pytree.tree_map(
            place, output, is_leaf=lambda x: type(x) in (AttentionWeights, TracedCache)
        )
        self.recorder.left = tuple(left)
        still = unset(self.module)
        self.recorder.unset = tuple(name for name in empty if name in still)
        return *returned, *left.values()


def export(module: nn.Module, call: Call) -> Trace:
    """Trace `module` under `call`; axes that `call` marks as dynamic stay symbolic.

    Raises TraceError, with the reason of torch.export in one line.
    """
    try:
        with (
            quiet(),
            masks_without_hints(),
            torch.no_grad(),
            fake_cpu(module, call.tensors) as fake,
            watched_branches() as branches,
        ):
            kept = kept_tensors(module)
            recorder, program = with_places_that_are_used(lambda unused: _exported(module, call, fake, unused))
            drop_self_copies(program.graph)
            if _writes_in_place(program.graph):
                program = _without_writes(program)
                name_stores(program)
                drop_copies(program.graph)
                join_filled(program.graph)
            given = program.graph_signature.user_inputs
            obstacle = call.obstacle or take_left(program.graph, recorder.left, given)
            spell_einsums(program.graph)
            spell_out(program.graph)
            add_biases_first(program.graph)
            group_experts(program.graph)
            merge_equal(program.graph)
    except Exception as error:
        raise TraceError(f"{type(module).__name__}: {_reason(error)}") from error
    inputs, state, constants = {}, {}, {}
    names = _first_names(module)
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            inputs[name] = len(inputs)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            path = str(spec.target).removeprefix("module.")
            state[name] = names.get(path, path)
        else:
            constant = program.constants[str(spec.target)]
            place = next((path for path, tensor in kept if tensor is constant), None)
            if place is not None:
                state[name] = place
            else:
                constants[name] = constant
    for node in program.graph.nodes:
        if node.name in constants:
            node.meta["constant"] = constants[node.name]
    calls, asked, call = tuple(recorder.calls), tuple(branches), replace(call, obstacle=obstacle)
    return Trace(
        module,
        call,
        program.graph,
        inputs,
        state,
        constants,
        calls,
        recorder.output,
        recorder.assumes_all,
        asked,
        recorder.unset,
    )


def _exported(
    module: nn.Module, call: Call, fake: Callable[[Tensor], Tensor], unused: int
) -> tuple[Recorder, torch.export.ExportedProgram]:
    recorder = Recorder(module)
    called, tensors = _Called(module, call, recorder, unused), tuple(map(fake, call.tensors))
    shapes = tuple(dict.fromkeys(axes, Dim.AUTO) for axes in call.dynamic)
    with opaque_calls(recorder, call.extra):
        return recorder, torch.export.export(called, tensors, dynamic_shapes=(shapes,), strict=False)


def _reason(error: Exception) -> str:
    if isinstance(error, ModegptError):
        return str(error)
    text = str(error)
    if "is not on the expected device meta" in text:
        return "torch.export stopped: it reads tensors that are no argument or parameter of it (of a cache)"
    if "data-dependent" in text:
        places = re.findall(r'File "(?:.*/)?([^/"]+)", line (\d+), in forward', text)
        where = f" ({':'.join(places[-1])})" if places else ""
        return f"torch.export stopped: the forward pass branches on values that it computes{where}"
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"torch.export stopped: {first}"


def _first_names(module: nn.Module) -> dict[str, str]:
    """Name of a parameter → the first of its names, where it is shared."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}


def _writes_in_place(graph: fx.Graph) -> bool:
    """Whether an operation is there for what it writes into its operand: data flow does not show that."""
    schemas = [(node, getattr(node.target, "_schema", None)) for node in graph.nodes if node.op == "call_function"]
    return any(
        schema is not None
        and schema.is_mutable
        and (
            not node.users
            or node.all_input_nodes[0].users.keys() - {node}
            or effect(node.all_input_nodes[0]) is Effect.MOVE
            or node.all_input_nodes[0].op == "placeholder"  # of a buffer: later calls read it
        )
        for node, schema in schemas
    )


def _without_writes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program with every write into an operand as a new value."""
    return program.run_decompositions({})


def whole_model_call(input_ids: Tensor, rest: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None) -> Call:
    """The call `model(input_ids, *rest, **keywords)` with fixed sizes."""
    arguments: dict[str, Any] = {"*inputs": (Slot(0), *rest)}
    return Call(arguments | dict(keywords or {}), (), (input_ids,), ((),), None, False)
