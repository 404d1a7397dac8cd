"""What a model costs and what a rank of each site costs, four ways, read from the traced graphs.

parameters: of the decoder layers' weight matrices.   bytes: of all weights as they are stored, tied ones once.
multiply-adds: of one more token with `context` tokens attended to: every product with a weight matrix, the head of the
model too, and attention's products of queries with keys and of weights with values. Where a graph tells how many rows
go through the matrices of experts, only those count.   kv-cache: bytes of keys and values that one more token of one
sequence leaves behind in all layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from modegpt_graph.allocate.budget import PARAMETERS, Item
from modegpt_graph.flow.labels import shape_of
from modegpt_graph.match.site_module import Placed, SiteModule
from modegpt_graph.rewrite.budget import cache_bytes, site_items, stored_bytes
from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.graph import Graph, normalise
from modegpt_graph.trace.operations import Effect, arguments, data_operands, effect

BUDGETS = {
    "parameters": PARAMETERS,
    "bytes": "the stored weights' bytes",
    "multiply-adds": "the multiply-adds of a token",
    "kv-cache": "the key/value cache's bytes",
}
CONTEXT = 2048  # tokens that a token attends to, where nothing else is said


@dataclass(frozen=True)
class Costs:
    """totals: budget → what the whole model costs.   ranks: budget → site → what each rank less saves.

    context: tokens that a token attends to.   counted: what a reader must know of how it was counted, in sentences.
    """

    totals: Mapping[str, int]
    ranks: Mapping[str, Mapping[str, int]]
    context: int
    counted: str

    def items(self, items: Sequence[Item], budget: str) -> tuple[Item, ...]:
        """The same items, a rank of which costs what it does in this budget."""
        return tuple(replace(item, cost_per_rank=self.ranks[budget][item.id]) for item in items)


def count_costs(
    dense: nn.Module,
    modules: Sequence[SiteModule],
    trace: Trace,
    decoder_linear_parameters: int,
    context: int = CONTEXT,
) -> Costs:
    """All four. dense: with its weights.   trace: of the whole model, as the sites were found in it."""
    graph = normalise(trace)
    products = _products(graph)
    attended = [_attended(graph, key) for key in graph.nodes if graph.operation(key) in ("scores", "mix")]
    item_size = next(dense.parameters()).element_size()
    ranks: dict[str, dict[str, int]] = {name: {} for name in BUDGETS}
    for item, placed, module in zip(site_items(modules), *_placed(dense, modules), strict=True):
        ranks["parameters"][item.id] = item.cost_per_rank
        ranks["bytes"][item.id] = _bytes(placed, module)
        ranks["multiply-adds"][item.id] = _multiply_adds(placed, module, products, context)
        ranks["kv-cache"][item.id] = _cached(placed) * item_size
    cache = cache_bytes(dense)
    totals = {
        "parameters": decoder_linear_parameters,
        "bytes": stored_bytes(dense),
        "multiply-adds": round(sum(one.per_token for one in products.values()) + context * sum(m for m, _ in attended)),
        "kv-cache": round(sum(kept for _, kept in attended) * item_size) if cache is None else cache,
    }
    said = [
        f"Multiply-adds are of one token that attends to {context:,} tokens in every layer, the head included, and "
        "without the zeros that fill queries and values up to one width for fused kernels."
    ]
    if not all(one.is_routed for one in products.values()):
        said.append("How many tokens go to each expert is not in the graph: every expert is counted for every token.")
    if cache is None:
        said.append("The model keeps no key/value cache of its own: the keys and values that attention reads count.")
    return Costs(totals, ranks, context, " ".join(said))


@dataclass(frozen=True)
class _Product:
    """A weight matrix in use. rows: how often a token meets it.   size: entries of one copy.

    is_routed: whether the graph tells how many tokens meet it: not where experts take what tokens choose them at the
    time, nor where all run and what was not chosen is thrown away.
    """

    rows: float
    size: int
    is_routed: bool

    @property
    def per_token(self) -> float:
        return self.rows * self.size


def _products(graph: Graph) -> dict[str, _Product]:
    """Weight → its products with one token."""
    tokens, found = graph.trace.call.tensors[0].numel(), {}
    for weight, keys in graph.linears.items():
        linears = [linear for key in keys if (linear := graph.linear(key)) is not None]
        is_known = not any(_depends_on_data(linear.source) for linear in linears)
        rows = sum(prod(shape_of(linear.source)[:-1]) for linear in linears) / tokens if is_known else len(linears)
        is_routed = is_known and all(linear.experts is None or linear.offsets is not None for linear in linears)
        found[weight] = _Product(rows, prod(graph.trace.module.get_parameter(weight).shape[-2:]), is_routed)
    return found


def _depends_on_data(node: fx.Node) -> bool:
    """Whether a size of a node's value is known only when the model runs."""
    return any(bool(free_unbacked_symbols(size)) for size in node.meta["val"].shape)


def _attended(graph: Graph, key: str) -> tuple[float, float]:
    """One of attention's products: multiply-adds for each position that a token attends to, and what a token leaves
    behind for the tokens after it.
    """
    node, tokens = graph.traced(key), graph.trace.call.tensors[0].numel()
    is_scores = graph.operation(key) == "scores"
    if effect(node) is Effect.ATTENTION:
        query, keys, values = arguments(node)[:3]
        met, kept = (query, keys) if is_scores else (node, values)
        return prod(shape_of(met)) / tokens, prod(shape_of(kept)) / tokens
    first, second = data_operands(node)[-2:]
    met = first if is_scores else node
    return prod(shape_of(met)) / tokens, prod(shape_of(second)) / tokens


def _placed(dense: nn.Module, modules: Sequence[SiteModule]) -> tuple[list[Placed], list[nn.Module]]:
    """Every site and the module that it is in, with its weights."""
    pairs = [(placed, dense.get_submodule(one.path)) for one in modules for placed in one.placed]
    return [placed for placed, _ in pairs], [module for _, module in pairs]


def _bytes(placed: Placed, module: nn.Module) -> int:
    """Entries of matrices, and of the biases of those that give features, in bytes."""
    outline, total = placed.footprint.outline, 0
    for role, linear in outline.linears.items():
        members = placed.footprint.layout.members[role]
        weight = module.get_parameter(linear.weight)
        total += members[..., 0].numel() * _across(role, placed, module) * weight.element_size()
        if role in outline.producers and linear.bias is not None:
            total += members[..., 0].numel() * module.get_parameter(linear.bias).element_size()
    return total


def _across(role: str, placed: Placed, module: nn.Module) -> int:
    """Entries of a role's matrix that go with one of its rows, or, where it is fitted again, columns."""
    outline = placed.footprint.outline
    linear = outline.linears[role]
    rows, columns = linear.shape(tuple(module.get_parameter(linear.weight).shape))
    return columns if role in outline.producers else rows


def _multiply_adds(placed: Placed, module: nn.Module, products: Mapping[str, _Product], context: int) -> int:
    outline, members = placed.footprint.outline, placed.footprint.one.members
    total = 0.0
    for role, linear in outline.linears.items():
        product = products.get(placed.site.roles[role].parameter)
        rows = linear.copies if product is None else product.rows
        total += members[role][..., 0].numel() * _across(role, placed, module) * rows
    if not outline.consumers:
        query = next(iter(outline.producers))
        total += members[query][..., 0].numel() * context
    elif _mixes(placed):
        consumer = next(iter(outline.consumers))
        total += members[consumer][..., 0].numel() * context
    return round(total)


def _mixes(placed: Placed) -> bool:
    """Whether attention's weights multiply the site's features."""
    outline = placed.footprint.outline
    graph, region = outline.graph, set(outline.region)
    return any(graph.operation(key) == "mix" and graph.traced(key) in region for key in graph.nodes)


def _cached(placed: Placed) -> int:
    """Numbers in the key/value cache that go with a rank, for each token.

    Counted where the module hands keys and values to its cache; where there is none, one for each group of a key or a
    value.
    """
    footprint = placed.footprint
    outline, flow = footprint.outline, footprint.flow
    updates = [node for node in outline.graph.trace.graph.nodes if effect(node) is Effect.CACHE]
    if not updates:
        roles = tuple(outline.producers)
        if outline.consumers and not _mixes(placed):
            return 0
        return footprint.layout.members[roles[-1]][..., 0].numel()
    own = torch.cat([labels.flatten() for labels in footprint.members.values()])
    count = 0.0
    for operand in (operand for node in updates for operand in arguments(node)[:2]):
        labels = flow.labels.get(operand)
        if isinstance(labels, torch.Tensor):
            batch, positions = labels.shape[0], labels.shape[-2]
            count += int(torch.isin(labels, own).sum()) / (batch * positions)
    return round(count / footprint.layout.size)
