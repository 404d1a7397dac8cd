"""What a module keeps from one call to the next: writes into its buffers, as nodes of the graph.

A program without writes in place returns what its buffers hold afterwards beside its results. Here each of those values
goes into a `store`, so that results are results and everything that outlives a call is seen to.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from modegpt_graph.trace.filled import erase_unread
from modegpt_graph.trace.operations import arguments, operation
from modegpt_graph.trace.spelling import call_like

aten = torch.ops.aten
_WRITES = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION, OutputKind.PARAMETER_MUTATION)


def store(kept: Tensor, value: Tensor) -> Tensor:
    """Make a tensor that is kept hold `value`."""
    return kept.copy_(value)


def stores_of(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that keep a value beyond the call, in order."""
    return [node for node in graph.nodes if node.target is store]


def name_stores(program: ExportedProgram) -> None:
    """Make a `store` of every output that is no result of the program. The graph is changed."""
    graph, signature = program.graph, program.graph_signature
    places = {
        str(spec.target): spec.arg.name for spec in signature.input_specs if spec.kind is not InputKind.USER_INPUT
    }
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    output = graph.output_node()
    (values,) = arguments(output)
    results: list[Any] = []
    for spec, value in zip(signature.output_specs, values, strict=True):
        if spec.kind not in _WRITES:
            results.append(value)
            continue
        kept = inputs[places.get(str(spec.target), str(spec.target))]
        if value is not kept:
            with graph.inserting_before(output):
                node = graph.call_function(store, (kept, value))
            node.meta = {key: found for key, found in kept.meta.items() if key == "val"}
    output.args = (tuple(results),)


def drop_copies(graph: fx.Graph) -> None:
    """Put what is copied over a value in the place of that copy. The graph is changed."""
    for node in list(graph.nodes):
        if operation(node) != "copy" or len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
            continue
        over, value = arguments(node)[:2]
        wanted, found = over.meta["val"], value.meta["val"]
        if list(map(str, wanted.shape)) != list(map(str, found.shape)):
            continue
        if wanted.dtype != found.dtype:
            with graph.inserting_before(node):
                value = call_like(graph, node, aten.to.dtype, value, wanted.dtype)
        node.replace_all_uses_with(value)
        erase_unread(graph, node)
