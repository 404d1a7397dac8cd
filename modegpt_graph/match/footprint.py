"""Where a match stands in the traced graph: its region, its features, and its layout."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from modegpt_graph.flow.elements import of_one_position, shape_of
from modegpt_graph.flow.kept import follow_kept
from modegpt_graph.flow.labels import Flow, Labels, follow, reachable, run_on_labels
from modegpt_graph.flow.layout import Layout, LayoutError, build_layout, repeated
from modegpt_graph.match.matcher import Match
from modegpt_graph.trace.graph import Graph
from modegpt_graph.trace.linear import Linear
from modegpt_graph.trace.operations import Effect, arguments, data_operands, effect, is_data, operation
from modegpt_graph.trace.stores import stores_of


@dataclass(frozen=True)
class Outline:
    """A match in its traced graph.

    producers: role → product with the matrix whose rows are selected.   consumers: role → the one that is fitted again.
    operands: nodes whose values are consumed at the end of the region: the inputs of the consumers, or the two operands
    of the scores.   region: the nodes in between, in topological order.
    stores: those that keep what comes from the producers for later calls; what they read belongs to the region.
    """

    graph: Graph
    match: Match
    producers: Mapping[str, Linear]
    consumers: Mapping[str, Linear]
    operands: tuple[fx.Node, ...]
    end: fx.Node
    region: tuple[fx.Node, ...]
    stores: tuple[fx.Node, ...] = ()

    @property
    def linears(self) -> dict[str, Linear]:
        """Role → its product with a matrix."""
        return {**self.producers, **self.consumers}

    @property
    def experts(self) -> int | None:
        """How many equal sites this is at once, one for each expert of its tensors; None where these are matrices."""
        return next(iter(self.producers.values())).experts

    @property
    def copies(self) -> int:
        """How many equal sites this is at once."""
        return next(iter(self.producers.values())).copies

    def signature(self) -> tuple[object, ...]:
        """What two outlines share exactly when the same things stand between matrices of the same shapes."""
        places: dict[fx.Node, object] = {}

        def place(node: fx.Node) -> Any:
            if node not in places:
                value = node.meta.get("val")
                places[node] = (len(places), str(getattr(value, "shape", None)), str(getattr(value, "dtype", None)))
            return places[node]

        linears = tuple(
            (role, place(linear.node), linear.transposed, linear.bias is None, linear.experts)
            for role, linear in self.linears.items()
        )
        nodes = tuple(
            (str(node.target), str(fx.map_arg(cast(Any, (_telling(node), node.kwargs)), place)), place(node))
            for node in self.region
        )
        kept = [operand for node in self.stores for operand in node.all_input_nodes]
        ends = tuple(place(node) for node in (*self.operands, self.end, *kept))
        named = tuple(
            (name, place(self.graph.traced(key)))
            for name, key in (*self.match.values.items(), *self.match.operations.items())
        )
        return self.match.pattern.name, self.match.variant, linears, nodes, ends, named


@dataclass(frozen=True)
class Footprint:
    """An outline with its features followed.

    offsets: weight name → its first label.   layout: of all copies.   one: of the one whose features the labels are.
    members: role → (G, g, d) labels of the rows that are selected.
    """

    outline: Outline
    offsets: Mapping[str, int]
    flow: Flow
    one: Layout
    layout: Layout

    @property
    def members(self) -> dict[str, Tensor]:
        return {
            role: self.one.members[role] + self.offsets[linear.weight]
            for role, linear in self.outline.producers.items()
        }


def _telling(node: fx.Node) -> tuple[object, ...]:
    """A node's arguments, without the number of the call that an opaque node stands for."""
    return tuple(arguments(node)[:-1] if operation(node) in ("attention", "cache_update") else arguments(node))


def starts_of(linears: Sequence[Linear]) -> tuple[dict[fx.Node, Tensor], dict[str, int], int]:
    """Fresh labels for the outputs of matrix products: (node → labels, weight → first label, number of labels)."""
    starts: dict[fx.Node, Tensor] = {}
    offsets: dict[str, int] = {}
    count = 0
    for linear in linears:
        shape = shape_of(linear.node)
        if linear.weight not in offsets:
            offsets[linear.weight] = count
            count += shape[-1]
        first = offsets[linear.weight]
        starts[linear.node] = torch.arange(first, first + shape[-1]).expand(shape).contiguous()
    return starts, offsets, count


def nodes_between(starts: Sequence[fx.Node], ends: Sequence[fx.Node], stops: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Nodes on a path from `starts` to `ends` that passes no other node where `stops` holds; `ends` belong to it."""
    forward = reachable(starts, stops, forward=True)
    backward = reachable(ends, stops, forward=False) | set(ends)
    return forward & backward


def outline(graph: Graph, match: Match) -> Outline:
    """Where a match begins and ends, and what stands in between."""
    decomposition = match.pattern.decomposition
    producers = {role: _linear(graph, match.linears[role]) for role in decomposition.select}
    consumers = {role: _linear(graph, match.linears[role]) for role in decomposition.refit}
    if consumers:
        end = next(iter(consumers.values())).node
        operands = tuple(linear.source for linear in consumers.values())
    else:
        end = graph.traced(match.operations["scores"])
        operands = _score_operands(end)
    starts = [linear.node for linear in producers.values()]
    stores = _stores_after(graph, starts, end)
    kept = [(arguments(node)[0], arguments(node)[1]) for node in stores]
    begins, ends = [*starts, *(before for before, _ in kept)], [*operands, *(after for _, after in kept)]
    inside = nodes_between(begins, ends, graph.is_linear) - set(begins)
    region = sorted((node for node in inside if is_data(node) and not graph.is_linear(node)), key=graph.place)
    return Outline(graph, match, producers, consumers, operands, end, tuple(region), stores)


def _stores_after(graph: Graph, starts: Sequence[fx.Node], end: fx.Node) -> tuple[fx.Node, ...]:
    """Stores of the module's own tensors that what comes from `starts` reaches before it is consumed."""
    reached = reachable(starts, lambda node: node is end or graph.is_linear(node), forward=True) - {end}
    own = graph.trace.state
    return tuple(node for node in stores_of(graph.trace.graph) if node in reached and arguments(node)[0].name in own)


def locate(found: Outline, *, approximates: bool = False) -> Footprint:
    """Follow the features of a match from its producers to where they are consumed.

    approximates: whether norms are taken to couple nothing, see Flow.
    Raises LayoutError where the features do not form regular groups, or are read elsewhere too.
    """
    if len({(linear.experts, linear.offsets) for linear in found.linears.values()}) > 1:
        raise LayoutError("its matrices do not belong to the same experts")
    starts, offsets, count = starts_of(list(found.producers.values()))
    carried = {role: _carriers(found, role, linear, starts, count) for role, linear in found.producers.items()}
    flow, one = _followed(found, starts, offsets, count, carried, approximates)
    members = torch.cat([(one.members[role] + offsets[p.weight]).flatten() for role, p in found.producers.items()])
    if not torch.isin(torch.cat(list(carried.values())), members).all():
        # What happens to features that only stand beside those of the site is no concern of it.
        carried = {role: labels[torch.isin(labels, members)] for role, labels in carried.items()}
        flow, one = _followed(found, starts, offsets, count, carried, approximates)
    _refuse_escapes(found, flow, one)
    return Footprint(found, offsets, flow, one, _of_all_copies(found, one))


def _followed(
    found: Outline,
    starts: Mapping[fx.Node, Tensor],
    offsets: Mapping[str, int],
    count: int,
    carried: Mapping[str, Tensor],
    approximates: bool,
) -> tuple[Flow, Layout]:
    """The flow of the carried labels alone, and the layout that it gives."""
    own = torch.cat(list(carried.values()))
    own_starts = {node: torch.where(torch.isin(s, own), s, -1) for node, s in starts.items()}
    flow = follow_kept(found.region, own_starts, count, found.stores, approximates=approximates)
    if not found.consumers:
        _contract(found.end, found.operands, flow)
    carriers = {role: (labels, labels - offsets[found.producers[role].weight]) for role, labels in carried.items()}
    for role, linear in found.consumers.items():
        labels = _labels_at(linear.source, flow)
        columns = _at_all_positions(labels.reshape(-1, labels.shape[-1])).squeeze(0)
        carriers[role] = (columns, torch.arange(len(columns)))
    return flow, build_layout(_anchor(found, flow), flow.classes, carriers)


def _of_all_copies(found: Outline, one: Layout) -> Layout:
    if found.experts is None:
        return one
    if one.groups > 1:
        raise LayoutError("experts with heads of their own are not followed")
    sizes = {role: shape_of(linear.node)[-1] for role, linear in found.producers.items()}
    sizes |= {role: shape_of(linear.source)[-1] for role, linear in found.consumers.items()}
    return repeated(one, found.copies, sizes)


def _linear(graph: Graph, key: str) -> Linear:
    linear = graph.linear(key)
    assert linear is not None, f"{key} is no product with a matrix"
    return linear


def _score_operands(end: fx.Node) -> tuple[fx.Node, ...]:
    args = arguments(end)[1:] if operation(end) == "baddbmm" else end.args
    query, key = args[0], args[1]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    return query, key


def _labels_at(node: fx.Node, flow: Flow) -> Tensor:
    labels = flow.labels.get(node)
    if not isinstance(labels, Tensor):
        raise LayoutError(f"the features cannot be followed to `{node.name}`: {_lost(flow)}")
    return labels


def _lost(flow: Flow) -> str:
    names = ", ".join(f"`{operation(node)}`" for node in flow.unknown)
    return f"what {names} does to them is not known" if names else "they are summed or cut off on the way"


def _contract(end: fx.Node, operands: Sequence[fx.Node], flow: Flow) -> None:
    """Query and key features meet in the product."""
    query, key = (_labels_at(operand, flow) for operand in operands)
    if effect(end) is not Effect.ATTENTION:
        key = key.transpose(-1, -2)
    query, key = _at_all_positions(query), _at_all_positions(key)
    if effect(end) is Effect.ATTENTION and query.shape[1] != key.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    try:
        query, key = torch.broadcast_tensors(query, key)
    except RuntimeError:
        raise LayoutError("query and key do not meet feature by feature") from None
    flow.classes.join(query, key)


def _at_all_positions(labels: Tensor) -> Tensor:
    """(…, S, d) → (…, 1, d). Raises LayoutError where positions differ."""
    one = of_one_position(labels)
    if one is None:
        raise LayoutError("at some positions the values that are consumed come from elsewhere")
    return one


def _anchor(found: Outline, flow: Flow) -> Tensor:
    """(heads, d) labels where the features are consumed."""
    graph, match, operands, end = found.graph, found.match, found.operands, found.end
    if "scores" in match.operations and not match.pattern.decomposition.refit:
        labels = _labels_at(operands[1], flow)
        if effect(end) is not Effect.ATTENTION:
            labels = labels.transpose(-1, -2)
    elif "mix" in match.operations:
        mix = graph.traced(match.operations["mix"])
        labels = _labels_at(arguments(mix)[2] if effect(mix) is Effect.ATTENTION else arguments(mix)[1], flow)
    else:
        labels = _labels_at(operands[0], flow)
        labels = labels.reshape(1, -1, labels.shape[-1])
    labels = _at_all_positions(labels).squeeze(-2)
    labels = labels.reshape(-1, labels.shape[-1])
    # Products of features add up: those that come from elsewhere are another part of what is consumed.
    own = (labels >= 0).any(0)
    if not own.any():
        raise LayoutError("the features that are consumed first come from elsewhere")
    return labels[:, own]


def _carriers(found: Outline, role: str, linear: Linear, starts: Mapping[fx.Node, Tensor], count: int) -> Tensor:
    """Labels of the rows of a matrix that reach the role's value, alone or mixed with others of the role."""
    own = starts[linear.node].reshape(-1, shape_of(linear.node)[-1])[0]
    value = found.graph.traced(found.match.values[role])
    if value is linear.node:
        return own
    upstream = reachable([value], lambda node: node is linear.node, forward=False) | {value}
    alone = follow([node for node in found.region if node in upstream], {linear.node: starts[linear.node]}, count)
    classes = alone.classes.of(own)
    return own[torch.isin(classes, alone.classes.of(_labels_at(value, alone).unique()))]


def _refuse_escapes(found: Outline, flow: Flow, layout: Layout) -> None:
    """Features that something outside the region reads cannot be dropped."""
    classes = layout.fibres.unique()
    inside = {*found.region, found.end, *(node for linear in found.consumers.values() for node in linear.inner)}
    queue = [(node, labels) for node, labels in flow.labels.items()]
    outside: dict[fx.Node, Labels] = {}
    while queue:
        node, _ = queue.pop()
        for user in node.users:
            if user in found.stores:
                continue
            if user is found.end and _is_read_beside(user, node, found):
                _refuse_reader(user, flow.labels.get(node, outside.get(node)), classes, flow)
            if user in inside or user in outside or user in flow.labels or not is_data(user):
                if user.op != "output":
                    continue
            elif node not in data_operands(user):
                continue
            if effect(user) is Effect.MOVE:
                outside[user] = run_on_labels(user, {**flow.labels, **outside})
                queue.append((user, outside[user]))
                continue
            _refuse_reader(user, flow.labels.get(node, outside.get(node)), classes, flow)


def _is_read_beside(end: fx.Node, node: fx.Node, found: Outline) -> bool:
    """Whether the product of queries and keys reads one of them as its values, too."""
    return effect(end) is Effect.ATTENTION and not found.consumers and node in arguments(end)[2:]


def _refuse_reader(user: fx.Node, labels: Labels | None, classes: Tensor, flow: Flow) -> None:
    """Raise where what an operation outside of the region reads has features of the site."""
    parts = labels if isinstance(labels, tuple) else (labels,)
    if any(torch.isin(flow.classes.of(part.unique()), classes).any() for part in parts if part is not None):
        raise LayoutError(f"the features are also read by `{user.name}` ({operation(user)})")
