"""What stands between the matrices of a site commutes with: every mixing of features, columns, blocks, or nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from modegpt_graph.flow.elements import shape_of
from modegpt_graph.flow.labels import reachable, reduced_axes
from modegpt_graph.match.footprint import Footprint
from modegpt_graph.match.sites import Commutant
from modegpt_graph.trace.operations import Effect, effect, operation

TRANSPARENT = {Effect.MOVE, Effect.SAME, Effect.CACHE, Effect.SIZE, Effect.FRESH, Effect.COMPLEX, Effect.REAL}

_TURNING = frozenset({"neg", "sub", "rsub", "view_as_complex"})  # a rotation takes one feature from the other


@dataclass(frozen=True)
class Finding:
    """What the table of effects says of a site.

    between: operations from the matrices to where the features are consumed, in order.
    nonlinearities: sides of the site with an operation that does not commute with a mixing of features (0 to 2).
    coupled_by: what makes every feature depend on every other, in words.
    proven: whether every operation is in the table.   unknown: those that are not.
    """

    commutant: Commutant
    block_size: int | None
    nonlinearities: int
    between: tuple[str, ...]
    coupled_by: tuple[str, ...]
    proven: bool
    unknown: tuple[str, ...]


def find_commutant(footprint: Footprint) -> Finding:
    """Read a site's commutant off what its operations do to the features."""
    flow, layout = footprint.flow, footprint.layout
    sides = [_side(operand, footprint) for operand in footprint.outline.operands]
    nonlinear = [
        node for node in footprint.outline.region if node in flow.nonlinear and not _is_one_for_a_group(node, footprint)
    ]
    count = sum(any(node in side for node in nonlinear) for side in sides)
    coupled = _couplings(nonlinear, footprint)
    unknown = tuple(dict.fromkeys(operation(node) for node in flow.unknown))
    commutant: Commutant
    if not nonlinear:
        commutant, block_size = "linear", 1
    elif layout.block_size == 1:
        commutant, block_size = "columns", 1
    elif layout.block_size < layout.size and layout.kinds[0].count > 1:
        commutant, block_size = "blocks", layout.block_size
    else:
        commutant, block_size = "none", None
    return Finding(commutant, block_size, count, _between(footprint), coupled, not unknown, unknown)


def _is_one_for_a_group(node: fx.Node, footprint: Footprint) -> bool:
    """Whether a product multiplies all features of a group alike: it may differ from head to head."""
    axes, labels = footprint.flow.scaled.get(node, ()), footprint.flow.labels.get(node)
    if not axes or not isinstance(labels, Tensor):
        return False
    classes = footprint.flow.classes.of(labels)
    place = torch.zeros_like(labels)
    for axis in axes:
        steps = torch.arange(labels.shape[axis]).view([-1 if a == axis else 1 for a in range(labels.ndim)])
        place = place * labels.shape[axis] + steps
    met = torch.stack([place.flatten(), classes.flatten()]).unique(dim=1)  # which feature stands at which factor
    for fibre in footprint.one.fibres:
        own = met[0, torch.isin(met[1], fibre)]
        if (own.unique(return_counts=True)[1] != len(fibre.unique())).any():
            return False
    return True


def _couplings(nodes: Sequence[fx.Node], footprint: Footprint) -> tuple[str, ...]:
    """What couples features, by the names of the modules that do it, where these are modules of their own."""
    modules: dict[str, list[str]] = {}
    for node in nodes:
        if effect(node) is Effect.REDUCE:
            names = modules.setdefault(_said(node, footprint), [])
            module = _module_name(node, footprint)
            if module is not None and module not in names:
                names.append(module)
    return tuple(f"{_norms(names)} ({said})" if names else said for said, names in modules.items())


def _norms(names: Sequence[str]) -> str:
    return f"the norm{'s' * (len(names) > 1)} {' and '.join(f'`{name}`' for name in names)}"


def _said(node: fx.Node, footprint: Footprint) -> str:
    """`mean over the 64 features of a head`; there are no heads where there is only one."""
    shape = next((shape_of(one) for one in node.all_input_nodes if one in footprint.flow.labels), ())
    width = math.prod(shape[axis] for axis in reduced_axes(node, len(shape)))
    layout = footprint.layout
    heads = " of a head" * any(rows.shape[:2] != (1, 1) for rows in layout.members.values())
    where = f"the {width} features{heads}" if width <= layout.size else f"all {width} features, across heads"
    return f"{operation(node)} over {where}"


def _module_name(node: fx.Node, footprint: Footprint) -> str | None:
    """Name of the innermost module that a node belongs to, None where that module holds a matrix of the site too."""
    stack = [where for where, _ in (node.meta.get("nn_module_stack") or {}).values()]
    path = stack[-1].removeprefix("module.").removeprefix("module") if stack else ""
    weights = [linear.weight for linear in footprint.outline.producers.values()]
    if not path or any(weight.startswith(f"{path}.") for weight in weights):
        return None
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), None)


def _side(operand: fx.Node, footprint: Footprint) -> set[fx.Node]:
    region = set(footprint.outline.region)
    return (reachable([operand], lambda node: node not in region, forward=False) & region) | {operand}


def _between(footprint: Footprint) -> tuple[str, ...]:
    names: list[str] = []
    graph, match = footprint.outline.graph, footprint.outline.match
    mix = graph.traced(match.operations["mix"]) if "mix" in match.operations else None
    for node in footprint.outline.region:
        if node not in footprint.flow.labels and effect(node) is not Effect.ATTENTION:
            continue
        kind = effect(node)
        if kind in TRANSPARENT:
            continue
        name = "mix" if node is mix or kind is Effect.ATTENTION else operation(node).removesuffix("_")
        names.append(name)
    rotation = _rotation(footprint)
    if rotation:
        names = [name for name in names if name not in ("mul", "neg", "add", "sub")]
        names.append(rotation)
    return tuple(dict.fromkeys(names))


def _rotation(footprint: Footprint) -> str | None:
    """`rotary (half-split)` or `rotary (interleaved)`, read off the offsets of the coupled pairs."""
    kind = footprint.layout.kinds[0]
    turns = any(operation(node).removesuffix("_") in _TURNING for node in footprint.outline.region)
    if kind.block_size != 2 or not turns:
        return None
    first, second = kind.positions[0, :, 0], kind.positions[0, :, 1]
    offsets: Tensor = (second - first).unique()
    if offsets.numel() != 1:
        return "pairs"
    if int(offsets) == 1 and kind.count > 1:
        return "rotary (interleaved)"
    half = int(offsets) == kind.count and torch.equal(first.sort().values, first)
    return "rotary (half-split)" if half else "pairs"
