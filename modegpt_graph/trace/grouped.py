"""A product with each expert's matrix, side by side again, is one grouped product, and is said so.

`cat([linear(part, experts[i]) for i, part in enumerate(x.split(counts))])` is `_grouped_mm(x, expertsᵀ, ends)` with
`ends` the running sum of `counts`: its graph has no sizes that depend on data, and one node for all experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from modegpt_graph.trace.filled import erase_unread
from modegpt_graph.trace.operations import arguments, operation
from modegpt_graph.trace.spelling import call_like

aten = torch.ops.aten


def group_experts(graph: fx.Graph) -> None:
    """Replace every such chain by one grouped product. The graph is changed.

    Left as they are: parts that are not all of the tensor, in order, along its first axis; counts that are not read off
    one tensor; and products with biases.
    """
    ends: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        found = _parts(node)
        if found is None:
            continue
        source, counts, experts = found
        if counts not in ends:
            with graph.inserting_after(counts):
                summed = call_like(graph, counts, aten.cumsum.default, counts, 0)
            with graph.inserting_after(summed):
                ends[counts] = call_like(graph, counts, aten.to.dtype, summed, torch.int32)
        with graph.inserting_before(node):
            turned = call_like(graph, node, aten.transpose.int, experts, -2, -1)
            joined = graph.call_function(aten._grouped_mm.default, (source, turned, ends[counts]))
        rows, columns = source.meta["val"].shape[0], turned.meta["val"].shape[-1]
        with node.meta["val"].fake_mode:  # the operation's own rule knows fewer number formats than its kernels
            joined.meta = {**node.meta, "val": source.meta["val"].new_empty(rows, columns)}
        node.replace_all_uses_with(joined)
        erase_unread(graph, node)


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, counts, parameter) where a node joins what every part of x says to its own matrix of the parameter."""
    if operation(node) not in ("cat", "concat") or (len(node.args) > 1 and node.args[1] != 0):
        return None
    products: Sequence[Any] = arguments(node)[0]
    if not all(isinstance(one, fx.Node) and operation(one) == "linear" and len(one.args) == 2 for one in products):
        return None
    parts, matrices = zip(*(arguments(one) for one in products), strict=True)
    split, experts = _all_of(parts, "getitem"), _all_of(matrices, "select")
    if split is None or experts is None or experts.meta["val"].ndim != 3 or len(products) != len(experts.meta["val"]):
        return None
    if operation(split) != "split_with_sizes" or (len(split.args) > 2 and split.args[2] != 0):
        return None
    source, sizes = arguments(split)[:2]
    items = [arguments(one)[0] for one in sizes if isinstance(one, fx.Node) and operation(one) == "item"]
    unbound = _all_of(items, "getitem")
    if len(items) != len(products) or unbound is None or operation(unbound) != "unbind":
        return None
    return source, arguments(unbound)[0], experts


def _all_of(nodes: Sequence[Any], name: str) -> fx.Node | None:
    """The one value whose first, second, … part the nodes are, in order; None where they are not that."""
    wanted = [(0, number) if name == "select" else (number,) for number in range(len(nodes))]
    said = [operation(one) == name and tuple(one.args[1:]) == place for one, place in zip(nodes, wanted, strict=True)]
    return nodes[0].args[0] if said and all(said) and len({one.args[0] for one in nodes}) == 1 else None
