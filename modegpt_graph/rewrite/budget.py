"""What each rank of a site costs, and what a model weighs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modegpt_graph.allocate.budget import Item
from modegpt_graph.match.site_module import Placed, SiteModule
from modegpt_graph.models import cache_of, can_generate

GROUPED_MULTIPLE = 8  # kernels that multiply all experts at once read rows of whole 16 bytes: 8 numbers of 2 bytes


def site_items(modules: Sequence[SiteModule]) -> tuple[Item, ...]:
    """One item a site; a rank is one feature of every group, in all of the site's matrices."""
    return tuple(_item(one, placed) for one in modules for placed in one.placed)


def _item(one: SiteModule, placed: Placed) -> Item:
    layout, outline = placed.footprint.layout, placed.footprint.outline
    cost = 0
    for role, linear in outline.linears.items():
        rows, columns = linear.shape(tuple(one.trace.module.get_parameter(linear.weight).shape))
        across = columns if role in outline.producers else rows
        cost += layout.members[role].shape[0] * layout.members[role].shape[1] * across
    smallest = sum(kind.block_size for kind in layout.kinds)
    multiple = layout.kinds[0].block_size if len(layout.kinds) == 1 else 1
    if any(linear.offsets is not None for linear in outline.linears.values()):
        multiple = math.lcm(multiple, GROUPED_MULTIPLE)
    return Item(placed.site.id, placed.site.layer, layout.size, cost, minimum=smallest, multiple=multiple)


def parameter_count(model: nn.Module, *, without_embeddings: bool = False) -> int:
    """Parameters of a model, tied ones once; without its embedding tables and what is tied to them."""
    tables = {id(part.weight) for part in model.modules() if without_embeddings and isinstance(part, nn.Embedding)}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights on disk: tied tensors once."""
    seen = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(seen.values())


def cache_bytes(model: nn.Module) -> int | None:
    """Bytes that one more token of one sequence takes in the key/value cache; None for models without one."""
    if not can_generate(model):
        return None
    with torch.no_grad():
        cache = cache_of(model(torch.zeros(1, 1, dtype=torch.long), use_cache=True))
    tensors = [t for layer in getattr(cache, "layers", ()) for t in vars(layer).values() if isinstance(t, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) or None
