"""Consumers of sites that are linear modules of the model."""

from collections.abc import Sequence

from torch import nn

from modegpt_graph.match.site_module import Placed, SiteModule, projection_module
from modegpt_graph.trace.linear import Linear


def consumer_places(model: nn.Module, modules: Sequence[SiteModule]) -> dict[str, tuple[SiteModule, Placed]]:
    """Path of each consumer that is an `nn.Linear` of the model → its site."""
    places = {}
    for one in modules:
        for placed in one.placed:
            for product in placed.footprint.outline.consumers.values():
                path = linear_path(model, one, product)
                if path is not None and product.experts is None:
                    places[path] = (one, placed)
    return places


def linear_path(model: nn.Module, one: SiteModule, product: Linear) -> str | None:
    """Of the `nn.Linear` of the model that does nothing but this product; None where there is none."""
    inner = projection_module(one, product)
    path = ".".join(filter(None, (one.path, inner))) if inner is not None else None
    return path if path is not None and type(model.get_submodule(path)) is nn.Linear else None
