"""Features in what a module keeps from call to call: they stand before a call where they stand after it.

A cache holds what earlier calls of the same module wrote. So its labels follow from what a call writes: where that is
known, it holds at all positions that share it, and it is right exactly where a call that starts with such a cache
leaves one of the same labels behind.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from modegpt_graph.flow.elements import PADDING, shape_of
from modegpt_graph.flow.labels import Flow, Labels, follow
from modegpt_graph.flow.layout import LayoutError
from modegpt_graph.trace.operations import arguments


def follow_kept(
    region: Sequence[fx.Node],
    starts: Mapping[fx.Node, Tensor],
    count: int,
    stores: Sequence[fx.Node] = (),
    *,
    approximates: bool = False,
) -> Flow:
    """`follow`, with labels for what is kept. stores: those in which features may end.

    Raises LayoutError where what is kept does not hold the same features before and after a call.
    """
    if not stores:
        return follow(region, starts, count, approximates=approximates)
    unknown = {kept: count + number for number, (kept, _) in enumerate(map(_ends, stores))}
    seeds = {kept: torch.full(shape_of(kept), label) for kept, label in unknown.items()}
    first = follow(region, {**starts, **seeds}, count + len(seeds))
    known: dict[fx.Node, Tensor] = {}
    for kept, value in map(_ends, stores):
        labels = first.labels.get(value)
        if isinstance(labels, Tensor) and ((labels >= 0) & (labels < count)).any():
            known[kept] = _everywhere(labels, unknown[kept], kept)
        elif any(_meets(labels, unknown[kept], count) for labels in first.labels.values()):
            raise LayoutError(f"what is written into `{kept.name}` is written over before the call ends")
    flow = follow(region, {**starts, **known}, count, approximates=approximates)
    for kept, value in map(_ends, stores):
        if kept in known and not _agree(flow.labels.get(value), known[kept]):
            raise LayoutError(f"`{kept.name}` does not hold the same features before and after a call")
    return flow


def kept_in(flow: Flow, stores: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
    """What is kept and holds features → its labels."""
    found = {kept: flow.labels.get(kept) for kept, _ in map(_ends, stores)}
    return {kept: labels for kept, labels in found.items() if isinstance(labels, Tensor)}


def selected(value: Tensor, labels: Tensor, smaller: Tensor) -> Tensor:
    """A kept tensor with the features that `smaller`, the labels of what stays, has in their places."""
    ranked, order = labels.reshape(-1).sort(stable=True)
    wanted, places = smaller.reshape(-1).sort(stable=True)
    found = value.new_empty(smaller.numel())
    found[places] = value.reshape(-1)[order[torch.isin(ranked, wanted)]]
    return found.reshape(smaller.shape)


def mixed(value: Tensor, labels: Tensor, old: Tensor, new: Tensor, mixing: Tensor) -> Tensor:
    """A tensor with features mixed: `mixing` (d, k) of those labelled `old` (d,) in the places of `new` (k,)."""
    ranked, order = labels.reshape(-1).sort(stable=True)

    def places(wanted: Tensor) -> Tensor:
        first, last = (torch.searchsorted(ranked, wanted.contiguous(), right=right) for right in (False, True))
        return torch.stack([order[start:stop] for start, stop in zip(first.tolist(), last.tolist(), strict=True)])

    before, flat = value.reshape(-1), value.clone().reshape(-1)
    sources = places(old)  # (d, n)
    if sources.numel():
        flat[places(new)] = (mixing.to(torch.float64).T @ before[sources].to(torch.float64)).to(value.dtype)
    return flat.reshape(value.shape)


def _ends(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(what is kept, the value that it holds afterwards) of a store."""
    kept, value = arguments(node)
    return kept, value


def _everywhere(labels: Tensor, unknown: int, kept: fx.Node) -> Tensor:
    """Labels of what is kept, from those that one call wrote into a part of it. Zeros stand for any feature."""
    labels = labels.masked_fill(labels == PADDING, unknown)
    for axis in range(labels.ndim):
        known = labels.masked_fill(labels == unknown, -1 - unknown)  # less than any other label
        one = known.amax(axis, keepdim=True)
        if ((labels == one) | (labels == unknown)).all():
            labels = torch.where(labels == unknown, one, labels)
            labels = labels.masked_fill(labels == -1 - unknown, unknown)
    if (labels == unknown).any():
        raise LayoutError(f"what `{kept.name}` holds is not known where a call does not write")
    return labels


def _meets(labels: Labels, unknown: int, count: int) -> bool:
    """Whether features stand beside what was kept before, in one tensor."""
    parts = labels if isinstance(labels, tuple) else (labels,)
    return any(((one >= 0) & (one < count)).any() and (one == unknown).any() for one in parts)


def _agree(after: object, before: Tensor) -> bool:
    return isinstance(after, Tensor) and bool(((after == before) | (after == PADDING)).all())
