"""Norms on queries and keys, approximated: whole blocks are kept, and the norm is computed on what is kept.

A norm divides a token's features by one number that all of them make. Without some of them the number is another; the
error is one factor for each token and head, so it can be computed exactly from what the norm sums, for any choice of
features. It is measured on calibration text, never proven.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from modegpt_graph.flow.layout import LayoutError
from modegpt_graph.match.commutant import Finding, find_commutant
from modegpt_graph.match.footprint import Footprint, Outline, locate
from modegpt_graph.trace.operations import Effect, arguments, data_operands, effect, operation

_PASSES = (Effect.SAME, Effect.MOVE)
_HOMOGENEOUS = (*_PASSES, Effect.LINEAR_UNARY, Effect.CACHE, Effect.COMPLEX, Effect.REAL)
_SINGLE = (Effect.UNARY, Effect.LINEAR_UNARY, Effect.SUM, Effect.PRODUCT)


@dataclass(frozen=True)
class Norm:
    """One sum over a head's features, and what turns it into the number that the features are multiplied by.

    summed: the node whose elements are summed, one a feature.   reduction: the sum.   steps: operations from the sum to
    the number, each with one operand that varies.   divides: whether the features are divided by the number.
    degree: 2 where features are squared before they are summed, 1 where the reduction itself squares them; None where
    features with a factor of their own would not simply come out with it.
    """

    summed: fx.Node
    reduction: fx.Node
    steps: tuple[fx.Node, ...]
    divides: bool
    degree: int | None

    def factor(self, elements: Tensor) -> Tensor:
        """The number that features are multiplied by. elements: (…, k) of what is summed; returns (…, 1)."""
        between = arguments(self.reduction)[1:2] if operation(self.reduction) == "linalg_vector_norm" else []
        target = self.reduction.target
        assert callable(target)
        previous, value = self.reduction, target(elements, *between, [-1], True)
        for node in self.steps:
            if effect(node) not in _PASSES:
                step = node.target
                assert callable(step)
                value = step(*(value if arg is previous else arg for arg in node.args), **node.kwargs)
            previous = node
        return value.reciprocal() if self.divides else value

    def level(self, kept: int, size: int) -> float:
        """What features are multiplied by so that a reduction over `kept` of them is as if over `size`."""
        return (kept / size) ** 0.5 if operation(self.reduction) == "mean" else 1.0


def approximated(sketch: Outline) -> tuple[Footprint, Finding]:
    """A query/key site with its norms left out of what couples features.

    Raises LayoutError where what stands between the matrices cannot be approximated so.
    """
    footprint = locate(sketch, approximates=True)
    finding = find_commutant(footprint)
    norms_of(footprint)
    if finding.commutant not in ("columns", "blocks"):
        raise LayoutError("more than a norm couples all features")
    return footprint, finding


def norms_of(footprint: Footprint) -> dict[str, Norm]:
    """Role → its norm, for roles that have one. Raises LayoutError where it is of a form that is not known."""
    found: dict[str, Norm] = {}
    for node in footprint.flow.approximated:
        norm = _norm(node, footprint)
        role = _role(norm.summed, footprint)
        if role in found:
            raise LayoutError("more than one sum over features stands on one side, as in a norm that centres")
        found[role] = norm
    return found


def _role(summed: fx.Node, footprint: Footprint) -> str:
    """Role whose heads are summed over, each on its own."""
    labels = footprint.flow.labels[summed]
    assert isinstance(labels, Tensor)
    fibre = labels.reshape(-1, labels.shape[-1])[0].sort().values
    for role, members in footprint.members.items():
        heads = members.flatten(0, 1).sort(dim=1).values
        if heads.shape[1] == len(fibre) and (heads == fibre).all(dim=1).any():
            return role
    raise LayoutError(f"`{operation(summed)}` is summed over more than the features of a head")


def _norm(node: fx.Node, footprint: Footprint) -> Norm:
    """Follow the number that a sum gives to where it meets the features again."""
    labels = footprint.flow.labels
    steps: list[fx.Node] = []
    current = node
    while True:
        users = [user for user in current.users if effect(user) is not Effect.SIZE]
        meeting = [user for user in users if user in labels]
        if meeting:
            break
        if len(users) != 1 or effect(users[0]) not in (*_PASSES, *_SINGLE) or _others(users[0], current):
            raise LayoutError(f"what `{operation(node)}` over the features is used for is not known")
        current = users[0]
        steps.append(current)
    if len(users) != 1 or operation(meeting[0]).removesuffix("_") not in ("mul", "div"):
        raise LayoutError(f"`{operation(node)}` over the features does not scale them")
    divides = operation(meeting[0]).startswith("div")
    if divides and arguments(meeting[0])[1] is not current:
        raise LayoutError(f"`{operation(node)}` over the features is divided by them")
    return Norm(arguments(node)[0], node, tuple(steps), divides, _degree(node, footprint))


def _degree(node: fx.Node, footprint: Footprint) -> int | None:
    """How squares get into a sum; None where it has none, or where something on the way is not homogeneous."""
    summed = arguments(node)[0]
    labels = footprint.flow.labels
    apart = {footprint.outline.end, *(arguments(reduction)[0] for reduction in footprint.flow.approximated)}
    if not all(
        _homogeneous(other, labels) for other in footprint.outline.region if other in labels and other not in apart
    ):
        return None
    if operation(node) == "linalg_vector_norm":
        order = arguments(node)[1] if len(arguments(node)) > 1 else 2
        return 1 if order == 2 and summed in labels else None
    name, operands = operation(summed).removesuffix("_"), arguments(summed)
    squares = name == "square" or (name == "pow" and operands[1] == 2) or (name == "mul" and operands[0] is operands[1])
    return 2 if squares and operation(node) in ("mean", "sum") else None


def _homogeneous(node: fx.Node, labels: Mapping[fx.Node, object]) -> bool:
    """Whether features that are multiplied by a number before a node are multiplied by it after the node too."""
    featured = [operand for operand in data_operands(node) if operand in labels]
    kind = effect(node)
    if kind is Effect.SUM:
        return len(featured) == sum(not isinstance(operand, (int, float)) for operand in arguments(node)[:2]) == 2
    if kind is Effect.PRODUCT:
        name = operation(node).removesuffix("_")
        return len(featured) == 1 and (name == "mul" or (name == "div" and arguments(node)[0] is featured[0]))
    return kind in _HOMOGENEOUS


def _others(node: fx.Node, current: fx.Node) -> Sequence[fx.Node]:
    """Operands of a step beside the number itself."""
    return [operand for operand in node.all_input_nodes if operand is not current and effect(node) not in _PASSES]


def describe(finding: Finding, exact: Finding) -> str:
    """Why such a site is taken, and what it rests on."""
    coupled = " and ".join(exact.coupled_by) or "what stands between the matrices"
    kept = "whole blocks are kept" if finding.commutant == "blocks" else "some features are kept"
    return (
        f"approximated, not proven: under {coupled} every feature depends on the others; {kept}, the norm is "
        "computed on them, and weights and a factor for each head, fitted on calibration text, make up for it"
    )
