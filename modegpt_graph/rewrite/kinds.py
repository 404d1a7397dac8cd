"""Kinds of sites, and the few of each that are tried for all."""

from collections.abc import Callable, Sequence

import torch

from modegpt_graph.match.modules import Placed, SiteModule

TRIED = 4  # of each kind, evenly over the depth
Kind = tuple[str, int]  # name of the pattern, features a group


def kinds_of(modules: Sequence[SiteModule], wanted: Callable[[Placed], bool]) -> dict[Kind, list[Placed]]:
    """The wanted sites, kind by kind, in the model's order."""
    kinds: dict[Kind, list[Placed]] = {}
    for placed in filter(wanted, (placed for one in modules for placed in one.placed)):
        kinds.setdefault((placed.site.pattern, placed.footprint.layout.size), []).append(placed)
    return kinds


def tried(alike: Sequence[Placed]) -> list[Placed]:
    """Those of a kind that stand for all."""
    places = torch.linspace(0, len(alike) - 1, min(TRIED, len(alike))).round().long().tolist()
    return [alike[place] for place in places]
