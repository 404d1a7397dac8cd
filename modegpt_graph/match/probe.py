"""The second half of a certificate: run the traced region in float64, select, run the rewritten region, compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from modegpt_graph.flow.elements import constant_of, hint, shape_of
from modegpt_graph.flow.kept import kept_in, mixed, selected
from modegpt_graph.flow.layout import Layout
from modegpt_graph.flow.shrink import Edits, Selection, ShrinkError, origins, select, shrink
from modegpt_graph.match.footprint import Footprint
from modegpt_graph.trace.operations import operation

TOLERANCE = 1e-9  # of the largest output, in float64


@dataclass(frozen=True)
class Probe:
    """Largest deviation relative to the largest output; or why no probe could be run."""

    max_error: float | None
    obstacle: str | None

    @property
    def holds(self) -> bool:
        return self.max_error is not None and self.max_error < TOLERANCE


def selection_of(layout: Layout, kept: Sequence[Tensor], labels: Mapping[str, Tensor], count: int) -> Selection:
    """The selection that keeps the given blocks of every group.

    kept: per kind, (G, n) blocks in their new order.   labels: role → (G, g, d) labels of its members.
    The first n blocks' places stay, and get the kept blocks' features.
    """
    keep = torch.ones(count, dtype=torch.bool)
    source = torch.arange(count)
    for members in labels.values():
        keep[members.reshape(-1)] = False
        for kind, chosen in zip(layout.kinds, kept, strict=True):
            groups = torch.arange(layout.groups).view(-1, 1, 1)
            places = kind.positions[:, : chosen.shape[1]]  # (G, n, b)
            taken = kind.positions[groups.squeeze(-1), chosen]  # (G, n, b)
            for head in range(members.shape[1]):
                own = members[:, head]  # (G, d)
                slots = own.gather(1, places.reshape(layout.groups, -1))
                keep[slots] = True
                source[slots] = own.gather(1, taken.reshape(layout.groups, -1))
    return Selection(keep, source)


def random_blocks(layout: Layout, generator: torch.Generator, share: float = 0.5) -> list[Tensor]:
    """Per kind, (G, n) random blocks: about `share` of them, in random order."""
    kept = []
    for kind in layout.kinds:
        orders = [torch.randperm(kind.count, generator=generator) for _ in range(layout.groups)]
        kept.append(torch.stack(orders)[:, : max(1, round(kind.count * share))])
    return kept


def probe_selection(footprint: Footprint, seed: int = 0) -> Probe:
    """Whether the region commutes with dropping and reordering whole blocks: σ(X S) = σ(X) S."""
    generator = torch.Generator().manual_seed(seed)
    kept = random_blocks(footprint.one, generator)
    selection = selection_of(footprint.one, kept, footprint.members, footprint.flow.classes.count)
    try:
        edits = shrink(footprint.outline.region, footprint.flow, selection)
        if footprint.outline.experts is not None and edits.gathers:
            (node, side), *_ = edits.gathers
            return Probe(None, f"`{operation(node)}` has one value of `{side.name}` for a feature of all experts")
        values, smaller = _run_both(footprint, edits, selection, None, generator)
    except (ShrinkError, RuntimeError) as error:
        return Probe(None, _one_line(error))
    worst = 0.0
    for operand in footprint.outline.operands:
        labels, after = footprint.flow.labels[operand], edits.labels[operand]
        assert isinstance(labels, Tensor)
        assert isinstance(after, Tensor)
        _, axis = select(labels, selection)
        expected = values[operand]
        if axis is not None:
            expected = torch.take_along_dim(expected, origins(labels, after, axis), axis)
        worst = max(worst, _deviation(expected, smaller[operand]))
    return Probe(worst, None)


def probe_mixing(footprint: Footprint, seed: int = 0) -> Probe:
    """Whether the region commutes with any mixing of each group's features into fewer: σ(X A) = σ(X) A."""
    generator = torch.Generator().manual_seed(seed)
    layout = footprint.one
    count = max(1, layout.size // 2)
    kept = [torch.arange(count).expand(layout.groups, -1)]
    labels = footprint.members
    selection = selection_of(layout, kept, labels, footprint.flow.classes.count)
    mixing = torch.randn(layout.groups, layout.size, count, dtype=torch.float64, generator=generator)
    try:
        edits = shrink(footprint.outline.region, footprint.flow, selection)
        values, smaller = _run_both(footprint, edits, selection, mixing, generator)
    except (ShrinkError, RuntimeError) as error:
        return Probe(None, _one_line(error))
    worst = 0.0
    for operand in footprint.outline.operands:
        old, new = footprint.flow.labels[operand], edits.labels[operand]
        assert isinstance(old, Tensor)
        assert isinstance(new, Tensor)
        before, after = _by_label(values[operand], old), _by_label(smaller[operand], new)
        for members in labels.values():
            for group in range(layout.groups):
                for head in members[group]:
                    if int(head[0]) not in before:
                        continue
                    full = torch.stack([before[int(label)] for label in head], dim=-1)
                    less = torch.stack([after[int(label)] for label in head[:count]], dim=-1)
                    worst = max(worst, _deviation(full @ mixing[group], less))
    return Probe(worst, None)


def _by_label(value: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """Label → all values that carry it, in the order in which they stand."""
    flat, order = labels.reshape(-1).sort(stable=True)
    found, counts = flat.unique_consecutive(return_counts=True)
    return dict(zip(found.tolist(), value.reshape(-1)[order].split(counts.tolist()), strict=True))


def _deviation(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-300))


def random_inputs(footprint: Footprint, generator: torch.Generator) -> dict[fx.Node, Tensor]:
    """Normal values in float64 for everything that the region reads from outside, the products with matrices too."""
    inputs: dict[fx.Node, Tensor] = {}
    for node in footprint.outline.region:
        for operand in node.all_input_nodes:
            if (
                operand not in footprint.outline.region
                and operand not in inputs
                and operand.meta.get("val") is not None
            ):
                inputs[operand] = _random(operand, generator)
    for linear in footprint.outline.producers.values():
        inputs.setdefault(linear.node, _random(linear.node, generator))
    return inputs


def _run_both(
    footprint: Footprint, edits: Edits, selection: Selection, mixing: Tensor | None, generator: torch.Generator
) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor]]:
    starts = {linear.node: footprint.flow.labels[linear.node] for linear in footprint.outline.producers.values()}
    inputs = random_inputs(footprint, generator)
    values = run_region(footprint.outline.region, inputs, Edits())
    fewer = dict(inputs)
    for node, labels in starts.items():
        kept = edits.labels[node]
        assert isinstance(kept, Tensor)
        assert isinstance(labels, Tensor)
        value = inputs[node] if mixing is None else _mixed(inputs[node], labels, footprint, mixing)
        origin = labels.reshape(-1, labels.shape[-1])[0]
        wanted = kept.reshape(-1, kept.shape[-1])[0]
        fewer[node] = value[..., _find(origin, wanted, selection)]
    for node, labels in kept_in(footprint.flow, footprint.outline.stores).items():
        smaller = edits.labels[node]
        assert isinstance(smaller, Tensor)
        value = inputs[node] if mixing is None else _mixed(inputs[node], labels, footprint, mixing)
        fewer[node] = selected(value, labels, smaller)
    return values, run_region(footprint.outline.region, fewer, edits)


def _find(origin: Tensor, wanted: Tensor, selection: Selection) -> Tensor:
    """Places of the wanted labels; elements without one stay where they are."""
    kept = torch.where(origin >= 0, selection.keep[origin.clamp(min=0)], True)
    places = torch.arange(len(origin))[kept]
    ranked, order = origin.sort()
    found = order[torch.searchsorted(ranked, wanted.contiguous()).clamp(max=len(origin) - 1)]
    return torch.where(wanted >= 0, found, places)


def _mixed(value: Tensor, labels: Tensor, footprint: Footprint, mixing: Tensor) -> Tensor:
    """A value with each group's features mixed into the places of the first ones."""
    for members in footprint.members.values():
        for group, heads in enumerate(members):
            for head in heads:
                value = mixed(value, labels, head, head[: mixing.shape[-1]], mixing[group])
    return value


def _random(node: fx.Node, generator: torch.Generator) -> Tensor:
    constant = constant_of(node)
    example = node.meta["val"]
    if constant is not None and constant.device.type != "meta":
        return constant.double() if constant.is_floating_point() else constant
    if not isinstance(example, Tensor):
        return example
    if example.is_complex():
        return torch.randn(shape_of(node), dtype=torch.complex128, generator=generator)
    if not example.is_floating_point():
        return torch.ones(shape_of(node), dtype=example.dtype)
    return torch.randn(shape_of(node), dtype=torch.float64, generator=generator)


def run_region(region: Sequence[fx.Node], inputs: Mapping[fx.Node, Tensor], edits: Edits) -> dict[fx.Node, Tensor]:
    """Run the nodes of a region with their edits, in float64."""
    values: dict[fx.Node, Tensor] = dict(inputs)
    for node in region:
        if node in edits.bypassed:
            continue
        target, args, kwargs = edits.arguments.get(node, (node.target, node.args, node.kwargs))

        def fill(leaf: object, node: fx.Node = node) -> object:
            if isinstance(leaf, fx.Node):
                value = values[leaf]
                gather = edits.gathers.get((node, leaf))
                return value if gather is None else torch.take_along_dim(*_aligned(value, gather.index, gather.axis))
            if isinstance(leaf, torch.dtype):
                return torch.float64 if leaf.is_floating_point else torch.complex128 if leaf.is_complex else leaf
            return torch.device("cpu") if isinstance(leaf, torch.device) else hint(leaf)

        filled_args, filled_kwargs = pytree.tree_map(
            fill, (tuple(args), dict(kwargs)), is_leaf=lambda leaf: isinstance(leaf, fx.Node)
        )
        # Kernels differ in how they lay their results out in memory; a view that the trace allows is a reshape here.
        target = torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target
        if getattr(getattr(target, "_schema", None), "is_mutable", False):  # what it writes into is read again here
            filled_args = (filled_args[0].clone(), *filled_args[1:])
        values[node] = target(*filled_args, **filled_kwargs)
    return values


def _aligned(value: Tensor, index: Tensor, axis: int) -> tuple[Tensor, Tensor, int]:
    """Operand, index and axis for `take_along_dim`, with as many axes each."""
    if index.ndim == 1:
        index = index.reshape([-1 if a == axis % value.ndim else 1 for a in range(value.ndim)])
    missing = index.ndim - value.ndim
    return value.reshape((1,) * missing + tuple(value.shape)) if missing > 0 else value, index, axis


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
