"""What a product of two computed values sums over: features (`scores`), or positions (`mix`).

Attention with a softmax is recognised by it while the graph is normalised. Attention without one (a softmax spelt out,
sigmoids, squares, none at all, heads that are mixed before it) is recognised here: by following the features of the
matrices behind both operands to the product.
"""

from torch import Tensor, fx

from modegpt_graph.flow.elements import of_one_position, varying_axes
from modegpt_graph.flow.labels import Labels, follow, reachable
from modegpt_graph.match.footprint import starts_of
from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.graph import Graph, normalise
from modegpt_graph.trace.operations import Effect, arguments, effect, is_data, operation

_NAMED = ("scores", "mix", "linear")


def attention_graph(trace: Trace) -> Graph:
    """The normalised graph of a trace, in which every product of two computed values is named by what it sums over."""
    graph = normalise(trace)
    linears = {graph.traced(key) for keys in graph.linears.values() for key in keys}
    by_node = {graph.traced(key): linear for key in graph.nodes if (linear := graph.linear(key)) is not None}
    for key in graph.nodes:
        node = graph.traced(key)
        operands = graph.operands(key)
        if (
            effect(node) is Effect.PRODUCT_SUM
            and graph.operation(key) not in _NAMED
            and len(operands) >= 2
            and all(graph.carries(operand) for operand in operands[-2:])
        ):
            found = _summed_over(graph, node, _sources(node, linears), by_node)
            if found is not None:
                attributes = graph.nodes.nodes[key]
                attributes["operation"], attributes["operands"] = found, operands[-2:]
    return graph


def _sources(node: fx.Node, linears: set[fx.Node]) -> list[fx.Node]:
    """The nearest products with matrices behind a node."""
    return [one for one in reachable([node], lambda other: other in linears, forward=False) if one in linears]


def _summed_over(graph: Graph, node: fx.Node, sources: list[fx.Node], by_node: dict) -> str | None:
    starts, _, count = starts_of([by_node[source] for source in sources])
    behind = reachable([node], lambda other: other in starts, forward=False) - set(starts)
    region = sorted((one for one in behind if is_data(one) and not graph.is_linear(one)), key=graph.place)
    flow = follow(region, starts, count)
    left, right = arguments(node)[1:3] if operation(node) == "baddbmm" else arguments(node)[:2]
    rows, columns = _along(flow.labels.get(left), last=True), _along(flow.labels.get(right), last=False)
    if rows == columns == "summed":
        return "scores"
    if columns == "free" and rows != "summed":
        return "mix"
    return None


def _along(labels: Labels | None, last: bool) -> str | None:
    """Whether features stand along the axis that a product sums over, or along the one that stays."""
    if not isinstance(labels, Tensor) or labels.ndim < 2:
        return None
    labels = labels if last else labels.mT
    one = of_one_position(labels)
    if one is not None:
        return "summed" if labels.ndim - 1 in varying_axes(one) else None
    one = of_one_position(labels.mT)
    return "free" if one is not None and labels.ndim - 1 in varying_axes(one) else None
