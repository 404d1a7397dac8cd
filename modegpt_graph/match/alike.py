"""Which modules look alike: what is traced for one of them is true of all."""

from collections.abc import Iterable, Sequence

import torch.utils._pytree as pytree
from torch import fx, nn

from modegpt_graph.match.sites import Site
from modegpt_graph.trace.calls import Call, plain
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
    return tensors, call.dynamic, tuple(call.arguments), tuple(map(plain, leaves)), len(call.cache_layers)


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


def differs_between_calls(graph: Graph, path: str) -> bool:
    """Whether a module that one pass calls more than once, with the same constants, does not do the same each time.

    Operations that depend on no input are left out: those of later calls may be those of the first.
    """
    wanted = f"module.{path}" if path else "module"
    depends: set[fx.Node] = set()
    calls: dict[str, dict[fx.Node, str]] = {}
    lines: dict[str, list[object]] = {}
    for node in graph.trace.graph.nodes:
        if node.op == "placeholder":
            depends |= {node} if node.name in graph.trace.inputs else set()
            continue
        if node.op != "call_function" or not depends & set(node.all_input_nodes):
            continue
        depends.add(node)
        stack = node.meta.get("nn_module_stack") or {}
        for key in [key for key, (where, _) in stack.items() if where == wanted]:
            own = calls.setdefault(key, {})
            args = arguments(node)[:-1] if operation(node) in ("attention", "cache_update") else arguments(node)

            held = {
                operand: own.get(operand, "input" if operand in depends else str(graph.trace.state.get(operand.name)))
                for operand in node.all_input_nodes
            }
            lines.setdefault(key, []).append(
                (str(node.target), str(fx.map_arg((tuple(args), node.kwargs), held.__getitem__)))
            )
            own[node] = f"%{len(own)}"
    return len({str(said) for said in lines.values()}) > 1


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
