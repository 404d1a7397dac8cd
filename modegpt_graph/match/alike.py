"""Which modules look alike: what is traced for one of them is true of all."""

from collections.abc import Iterable, Sequence

import torch.utils._pytree as pytree
from torch import fx, nn

from modegpt_graph.match.sites import Site
from modegpt_graph.trace.calls import Call
from modegpt_graph.trace.graph import Graph
from modegpt_graph.trace.opaque import AttentionCall
from modegpt_graph.trace.operations import arguments, operation


def relative(path: str, site: Site) -> tuple[object, ...]:
    """A site as its module names it."""
    return site.pattern, tuple((role, r.parameter.removeprefix(f"{path}."), r.rows) for role, r in site.roles.items())


def shape_of_call(call: Call) -> tuple[object, ...]:
    """What two calls of modules that look alike share."""
    tensors = tuple((tuple(t.shape), t.dtype) for t in call.tensors)
    leaves = pytree.tree_leaves(dict(call.arguments), is_leaf=lambda leaf: not isinstance(leaf, (dict, list, tuple)))
    return tensors, call.dynamic, tuple(call.arguments), tuple(map(_plain, leaves)), len(call.cache_layers)


def _plain(leaf: object) -> object:
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf).__name__


def parameters_of(module: nn.Module) -> tuple[object, ...]:
    """Names and shapes of a module's parameters: one that it only returns shows in none of its operations."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())


def structures(graph: Graph, paths: Iterable[str]) -> dict[str, object]:
    """Module → its operations in the whole model's trace, with what they are given, free of names."""
    wanted = {f"module.{path}" if path else "module": path for path in paths}
    nodes: dict[str, list[fx.Node]] = {path: [] for path in wanted.values()}
    for node in graph.trace.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for where in {where for where, _ in stack.values()} & wanted.keys():
            nodes[wanted[where]].append(node)
    return {path: _said(graph, own) for path, own in nodes.items()}


def _said(graph: Graph, nodes: Sequence[fx.Node]) -> object:
    places: dict[fx.Node, int] = {}

    def place(node: fx.Node) -> str:
        return f"%{places.setdefault(node, len(places))}"

    lines = []
    for node in nodes:
        args = tuple(arguments(node))
        if operation(node) == "attention":
            said = graph.trace.calls[args[-1]]
            assert isinstance(said, AttentionCall)
            args = (*args[:-1], said.scaling, said.tensors, str(dict(said.constants)), said.passed_through)
        lines.append((place(node), str(node.target), str(fx.map_arg((args, node.kwargs), place))))
    return tuple(lines)
