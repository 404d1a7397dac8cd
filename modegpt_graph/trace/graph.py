"""The normalised graph: a networkx graph in which attention, linear maps and data movement look alike everywhere.

Casts and copies vanish. Every product with a weight matrix is `linear`. Attention, however it is written, is three
nodes: `scores` (product over features), `weights` (everything up to and with the softmax) and `mix` (product over
positions). Features put side by side are `join`.
"""

from dataclasses import dataclass
from functools import cached_property

import networkx
from torch import fx, nn

from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.linear import ORDERS, Linear, find_linears
from modegpt_graph.trace.operations import Effect, data_operands, effect, is_data, operation

ELEMENTWISE = frozenset({Effect.LINEAR_UNARY, Effect.UNARY, Effect.SUM, Effect.PRODUCT})
_BETWEEN_SCORES_AND_MIX = ELEMENTWISE | {Effect.SAME, Effect.MOVE, Effect.REDUCE}


@dataclass(frozen=True)
class Graph:
    """A normalised graph.

    nodes: networkx graph; a node has `operation`, `effect`, `operands` (its predecessors in order), `fx` (the traced
    node), `carries` (whether it depends on a product with a weight matrix), and `linear` where it is one.
    linears: weight name → the nodes that multiply by it, in order; all experts in one tensor are one node.
    """

    trace: Trace
    nodes: networkx.DiGraph
    linears: dict[str, list[str]]

    def operands(self, key: str) -> tuple[str, ...]:
        return self.nodes.nodes[key]["operands"]

    def operation(self, key: str) -> str:
        return self.nodes.nodes[key]["operation"]

    def effect(self, key: str) -> Effect:
        return self.nodes.nodes[key]["effect"]

    def carries(self, key: str) -> bool:
        return self.nodes.nodes[key]["carries"]

    def linear(self, key: str) -> Linear | None:
        return self.nodes.nodes[key].get("linear")

    def traced(self, key: str) -> fx.Node:
        return self.nodes.nodes[key]["fx"]

    @cached_property
    def _linear_nodes(self) -> frozenset[fx.Node]:
        return frozenset(self.traced(key) for keys in self.linears.values() for key in keys)

    @cached_property
    def _places(self) -> dict[fx.Node, int]:
        return {node: place for place, node in enumerate(self.trace.graph.nodes)}

    def is_linear(self, node: fx.Node) -> bool:
        """Whether a traced node multiplies by a weight matrix."""
        return node in self._linear_nodes

    def other_reader(self, parameter: str, weight: str) -> fx.Node | None:
        """An operation that reads a parameter for something else than the products with `weight`; None without one."""
        products = [linear for key in self.linears[weight] if (linear := self.linear(key)) is not None]
        own = {node for linear in products for node in (linear.node, *linear.inner)}
        queue = [node for node in self.trace.graph.nodes if self.trace.state.get(node.name) == parameter]
        while queue:
            node = queue.pop()
            for user in node.users:
                if user in own or not is_data(user) or node not in data_operands(user):
                    continue
                if operation(user) not in ORDERS and effect(user) is not Effect.SAME:
                    return user
                queue.append(user)
        return None

    def place(self, node: fx.Node) -> int:
        """Place of a traced node in topological order."""
        return self._places[node]


def normalise(trace: Trace) -> Graph:
    """Build the normalised graph of a trace."""
    products = find_linears(trace)
    inner = {node for linear in products.values() for node in linear.inner}
    graph = networkx.DiGraph()
    linears: dict[str, list[str]] = {}
    names: dict[fx.Node, str] = {}
    roles = _attention_products(trace.graph)

    def add(key: str, node: fx.Node, name: str, kind: Effect, operands: list[str], **attributes: object) -> str:
        carries = "linear" in attributes or any(graph.nodes[operand]["carries"] for operand in operands)
        graph.add_node(
            key, fx=node, operation=name, effect=kind, operands=tuple(operands), carries=carries, **attributes
        )
        graph.add_edges_from((operand, key) for operand in operands)
        return key

    for node in trace.graph.nodes:
        if not is_data(node) or node in inner:
            continue
        operands = [names[operand] for operand in data_operands(node) if operand in names]
        kind, name = effect(node), operation(node).removesuffix("_")  # what is written in place is a value like others
        linear = products.get(node)
        if linear is not None:
            names[node] = add(node.name, node, "linear", Effect.LINEAR, [names[linear.source]], linear=linear)
            linears.setdefault(linear.weight, []).append(node.name)
        elif kind is Effect.SAME and operands:
            names[node] = operands[0]
        elif name == "getitem" and effect(node.args[0]) is Effect.CACHE:
            names[node] = names[node.args[0].args[node.args[1]]]
        elif kind is Effect.ATTENTION:
            query, key, value, *rest = operands
            scores = add(f"{node.name}:scores", node, "scores", Effect.PRODUCT_SUM, [query, key])
            weights = add(f"{node.name}:weights", node, "weights", Effect.REDUCE, [scores, *rest])
            names[node] = add(node.name, node, "mix", Effect.PRODUCT_SUM, [weights, value])
        else:
            if node in roles and len(operands) == 3:
                operands = operands[1:]  # baddbmm: the first operand is added to the product
            name = "join" if _joins_features(node) else roles.get(node, name)
            names[node] = add(node.name, node, name, kind, operands)
    return Graph(trace, graph, linears)


def _joins_features(node: fx.Node) -> bool:
    """Whether a node puts tensors side by side along their last axis."""
    if operation(node) not in ("cat", "concat"):
        return False
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return axis in (-1, node.meta["val"].ndim - 1)


def _attention_products(graph: fx.Graph) -> dict[fx.Node, str]:
    """`scores` and `mix` among plain matrix products: those before and after a softmax."""
    roles: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if operation(node) not in ("softmax", "_softmax"):
            continue
        before = _first_products(node, forward=False)
        after = _first_products(node, forward=True)
        if before and after:
            roles |= dict.fromkeys(before, "scores") | dict.fromkeys(after, "mix")
    return roles


def _first_products(start: fx.Node, forward: bool) -> list[fx.Node]:
    products, seen, queue = [], {start}, [start]
    while queue:
        node = queue.pop()
        for other in node.users if forward else node.all_input_nodes:
            if other in seen or not is_data(other):
                continue
            seen.add(other)
            if effect(other) is Effect.PRODUCT_SUM:
                products.append(other)
            elif effect(other) in _BETWEEN_SCORES_AND_MIX:
                queue.append(other)
    return products


def owner(trace: Trace, parameter: str) -> nn.Module:
    """The module that holds a parameter."""
    return trace.module.get_submodule(parameter.rpartition(".")[0])
