"""What can be told of single tensors of a graph: example sizes, constants, and labels that all positions share."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

from modegpt_graph.trace.operations import Effect, arguments, effect, operation

OTHER, PADDING = -1, -2  # elements that carry no feature, and those of them that are zero
ROUTED = 3  # an example of how many tokens go to an expert


def hint(value: Any) -> Any:
    """The example size behind a symbolic size, ROUTED where it depends on data; other values as they are."""
    return optimization_hint(value, fallback=ROUTED) if isinstance(value, torch.SymInt) else value


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Example shape of a node's value; an axis that depends on data has at least one place."""
    return tuple(size if isinstance(size, int) else int(hint(size)) or ROUTED for size in node.meta["val"].shape)


def varying_axes(labels: Tensor) -> tuple[int, ...]:
    """Axes along which the labels are not all equal."""
    return tuple(a for a in range(labels.ndim) if labels.shape[a] > 1 and (labels.narrow(a, 0, 1) != labels).any())


def is_zero(node: fx.Node) -> bool:
    """Whether a node is a new tensor of zeros."""
    while effect(node) in (Effect.SAME, Effect.MOVE) and isinstance(arguments(node)[0], fx.Node):
        node = arguments(node)[0]
    return operation(node) in ("zeros", "zeros_like", "new_zeros")


def of_one_position(labels: Tensor) -> Tensor | None:
    """(…, S, d) → (…, 1, d): the labels that all positions share, but for padding; None where they differ."""
    one = labels.amax(-2, keepdim=True)
    return one if ((labels == one) | (labels == PADDING)).all() else None


def constant_of(node: fx.Node) -> Tensor | None:
    """The value of a node that is a tensor made while tracing."""
    while effect(node) is Effect.SAME:
        node = arguments(node)[0]
    return node.meta.get("constant")
