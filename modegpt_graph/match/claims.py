"""A pattern's method is a claim about what stands between the matrices: when it is admitted, and what refutes it."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx

from modegpt_graph.flow.shrink import Edits
from modegpt_graph.match.footprint import Footprint
from modegpt_graph.match.patterns import Decomposition
from modegpt_graph.match.probe import TOLERANCE, random_inputs, run_region
from modegpt_graph.match.sites import Commutant, Method

CLAIMS: Mapping[Method, str] = {
    "svd": "any mixing of the features passes through unchanged",
    "nystrom": "each feature can be dropped alone",
    "cr": "features can be dropped in blocks",
}
_ADMITTED: Mapping[Commutant, tuple[Method, ...]] = {
    "linear": ("svd", "nystrom", "cr"),
    "columns": ("nystrom", "cr"),
    "blocks": ("cr",),
    "none": (),
}
_SCALES = (1.0, 10.0, 100.0)  # of the random inputs: a clamp is met only by large ones


def admitted_method(decomposition: Decomposition, commutant: Commutant) -> Method | None:
    """What is done with a site: the pattern's first claim that holds, None where none does.

    Where any mixing passes through, the SVD is used whatever is claimed: no selection of features beats it.
    """
    for method in (decomposition.method, decomposition.otherwise):
        if method in _ADMITTED[commutant]:
            return "svd" if commutant == "linear" else method
    return None


def counterexample(footprint: Footprint, method: Method) -> str | None:
    """What refutes the claim that a method makes, in figures of a run on random inputs; None where nothing was found.

    Features are counted from 0 in the first head.
    """
    witness = _mixing if method == "svd" else _dropping
    for scale in _SCALES:
        generator = torch.Generator().manual_seed(0)
        try:
            inputs = random_inputs(footprint, generator)
            starts = {linear.node for linear in footprint.outline.producers.values()}
            found = witness(footprint, {n: v * scale if n in starts else v for n, v in inputs.items()})
        except (RuntimeError, LookupError, TypeError, ValueError):
            return None
        if found is not None:
            return found
    return None


def _dropping(footprint: Footprint, inputs: Mapping[fx.Node, Tensor]) -> str | None:
    """One feature set to zero, and the other feature that this changes most."""
    members = footprint.members
    dropped = [int(labels[0, 0, 0]) for labels in members.values()]
    before = run_region(footprint.outline.region, inputs, Edits())
    after = run_region(
        footprint.outline.region, _changed(footprint, inputs, lambda part: _zeroed(part, dropped)), Edits()
    )
    best: tuple[float, int, float, float] | None = None
    for old, new, labels in _consumed(footprint, before, after):
        apart = torch.where((labels >= 0) & ~torch.isin(labels, torch.tensor(dropped)), (old - new).abs(), 0.0)
        place = int(apart.argmax())
        change = float(apart.reshape(-1)[place])
        if change > TOLERANCE * float(old.abs().max()) and (best is None or change > best[0]):
            best = change, int(labels.reshape(-1)[place]), float(old.reshape(-1)[place]), float(new.reshape(-1)[place])
    if best is None:
        return None
    _, label, was, now = best
    return f"with feature 0 set to zero, {_named(footprint, label)} went from {was:.3g} to {now:.3g}"


def _mixing(footprint: Footprint, inputs: Mapping[fx.Node, Tensor]) -> str | None:
    """One feature added to another before, and after, what stands in between."""
    pairs = {int(labels[0, 0, 0]): int(labels[0, 0, 1]) for labels in footprint.members.values()}
    before = run_region(footprint.outline.region, inputs, Edits())
    mixed = run_region(footprint.outline.region, _changed(footprint, inputs, lambda part: _added(part, pairs)), Edits())
    for old, new, labels in _consumed(footprint, before, mixed):
        for first, second in pairs.items():
            one, other = old[labels == first], old[labels == second]
            found = new[labels == first]
            if len(one) and len(one) == len(other):
                apart = (found - (one + other)).abs()
                place = int(apart.argmax())
                if float(apart[place]) > TOLERANCE * float(old.abs().max()):
                    expected = float(one[place] + other[place])
                    return (
                        f"feature 1 added to feature 0 before it gives {float(found[place]):.3g} there, "
                        f"and after it {expected:.3g}"
                    )
    return None


def _consumed(
    footprint: Footprint, before: Mapping[fx.Node, Tensor], after: Mapping[fx.Node, Tensor]
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """(value before, value after, labels) where the features are consumed."""
    for operand in footprint.outline.operands:
        labels = footprint.flow.labels.get(operand)
        if isinstance(labels, Tensor):
            yield before[operand], after[operand], labels


def _changed(
    footprint: Footprint, inputs: Mapping[fx.Node, Tensor], change: Callable[[tuple[Tensor, Tensor]], Tensor]
) -> dict[fx.Node, Tensor]:
    """The inputs, with the products with matrices changed. change((value, (F,) labels)) → new value."""
    changed = dict(inputs)
    for linear in footprint.outline.producers.values():
        labels = footprint.flow.labels[linear.node]
        assert isinstance(labels, Tensor)
        changed[linear.node] = change((changed[linear.node], labels.reshape(-1, labels.shape[-1])[0]))
    return changed


def _zeroed(part: tuple[Tensor, Tensor], dropped: list[int]) -> Tensor:
    value, labels = part
    return torch.where(torch.isin(labels, torch.tensor(dropped)), 0.0, value)


def _added(part: tuple[Tensor, Tensor], pairs: Mapping[int, int]) -> Tensor:
    value, labels = part
    value = value.clone()
    for first, second in pairs.items():
        here, there = (labels == first).nonzero().flatten(), (labels == second).nonzero().flatten()
        if len(here) and len(there):
            value[..., here[0]] += value[..., there[0]]
    return value


def _named(footprint: Footprint, label: int) -> str:
    """`feature 5`, and of which head where it is not the first."""
    for labels in footprint.members.values():
        found = (labels == label).nonzero()
        if len(found):
            group, head, feature = found[0].tolist()
            number = group * labels.shape[1] + head
            return f"feature {feature}" if number == 0 else f"feature {feature} of head {number}"
    return "another feature"
