"""What a module keeps from call to call, in the size of its smaller matrices: a cache of fewer features."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.errors import ModegptError
from modegpt_graph.flow.kept import mixed, selected
from modegpt_graph.flow.shrink import Edits
from modegpt_graph.match.site_module import Placed, SiteModule, kept_of, labels_of
from modegpt_graph.rewrite.solution import Solution, rank_of, taken


def resize_kept(
    module: nn.Module, one: SiteModule, placed: Sequence[Placed], solutions: Mapping[str, Solution], edits: Edits
) -> dict[str, tuple[int, ...]]:
    """Give every tensor that keeps features of rewritten sites its smaller form; path in the module → its new shape.

    What it holds is what the smaller matrices would have written. Raises ModegptError where that cannot be known.
    """
    shapes = {}
    for path, (node, labels) in kept_of(one).items():
        smaller = edits.labels[node]
        assert isinstance(smaller, Tensor)
        old = _held(module, path)
        if old.shape != labels.shape:
            raise ModegptError(f"`{path}` is {tuple(old.shape)}, and was {tuple(labels.shape)} when it was traced")
        if torch.equal(smaller, labels):
            continue
        if old.is_meta or not old.any():
            new = old.new_zeros(smaller.shape)
        else:
            value = old.detach().cpu()
            for p in placed:
                value = _mixed(value, labels, one, p, solutions[p.site.id], _is_saved(module, path), path)
            new = selected(value, labels, smaller).to(old.device)
        _put(module, path, new)
        shapes[path] = tuple(new.shape)
    return shapes


def _mixed(
    value: Tensor, labels: Tensor, one: SiteModule, placed: Placed, solution: Solution, is_saved: bool, path: str
) -> Tensor:
    """A kept tensor with the features of one site as its smaller matrices have them, in the places of the kept ones."""
    layout = placed.footprint.layout
    sources = taken(layout, solution.kept)
    for role, members in labels_of(one, placed).items():
        if not torch.isin(members, labels).any():
            continue
        maps = solution.maps.get(role)
        if maps is None:
            is_chosen = placed.site.decomposition != "svd" or rank_of(solution.kept, layout) == layout.size
            if not is_chosen and not is_saved:  # what is saved is read from the file afterwards
                raise ModegptError(f"`{path}` holds values of the dense model, and is not saved: set it to zero first")
            continue
        for group, heads in enumerate(members):
            for number, head in enumerate(heads):
                mixing = maps[group, min(number, maps.shape[1] - 1)]
                value = mixed(value, labels, head, head[sources[group]], mixing)
    return value


def _held(module: nn.Module, path: str) -> Tensor:
    owner, name = _place(module, path)
    return owner[int(name)] if isinstance(owner, list) else getattr(owner, name)


def _put(module: nn.Module, path: str, value: Tensor) -> None:
    owner, name = _place(module, path)
    if isinstance(owner, list):
        owner[int(name)] = value
    else:
        setattr(owner, name, value)


def _is_saved(module: nn.Module, path: str) -> bool:
    return path in module.state_dict()


def _place(module: nn.Module, path: str) -> tuple[Any, str]:
    """(the module or list that holds a tensor, its name or number there)."""
    parent, _, name = path.rpartition(".")
    owner: Any = module
    for part in filter(None, parent.split(".")):
        owner = owner[int(part)] if isinstance(owner, (list, tuple)) else getattr(owner, part)
    return owner, name
