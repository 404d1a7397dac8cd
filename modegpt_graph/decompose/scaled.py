"""The change of a matrix whose outputs scale features, for what a consumer makes of these features to err less."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modegpt_graph.decompose.correction import best_length
from modegpt_graph.decompose.numerics import factorise

SAMPLED = 4  # every fourth row tells enough of what the equations look like on average


@dataclass(frozen=True)
class ScaledRows:
    """Tokens by which a matrix U (K, D) is judged: its features are slopes ∘ (inputs Uᵀ), linear in U.

    inputs: (T, D).   slopes: (T, K).   left: (T, E) what is missing of the features' product with the consumer.
    """

    inputs: Tensor
    slopes: Tensor
    left: Tensor

    def moved(self, change: Tensor, consumer: Tensor) -> Tensor:
        """(T, E) what a change (K, D) of U adds to the product with a consumer (E, K)."""
        return (self.slopes * (self.inputs @ change.T)) @ consumer.T

    def pull(self, consumer: Tensor) -> Tensor:
        """(K, D) the adjoint of `moved` at `left`: downhill, for the squared error."""
        return ((self.left @ consumer) * self.slopes).T @ self.inputs


def scaled_direction(
    rows: Sequence[ScaledRows], consumer: Tensor, *, feature_ridge: float, input_ridge: float
) -> Tensor:
    """A change Δ (K, D) along which Σ ‖R − (S ∘ X Δᵀ) Wᵀ‖² falls: its minimum, were slopes and inputs independent.

    consumer: W (E, K).   The normal equations are then the Kronecker product of WᵀW ∘ SᵀS and XᵀX, of which each has a
    ridge relative to its mean diagonal. In truth they are not independent: how far to go is for `scaled_step_length`.
    Source: the Kronecker factors of Martens and Grosse (arXiv 1503.05671).
    """
    slopes = _gram([one.slopes for one in rows])
    pull = _sum([one.pull(consumer) for one in rows])
    features = _inverse((consumer.T @ consumer) * slopes, feature_ridge)
    return features @ pull @ _inverse(_gram([one.inputs for one in rows]), input_ridge)


def scaled_step_length(rows: Sequence[ScaledRows], consumer: Tensor, change: Tensor) -> float:
    """The t ≥ 0 that minimises Σ ‖R − t (S ∘ X Δᵀ) Wᵀ‖² over rows that Δ was not found from."""
    gained = spent = 0.0
    for one in rows:
        moved = one.moved(change, consumer)
        gained, spent = gained + _dot(moved, one.left), spent + _dot(moved, moved)
    return best_length(gained, spent)


def _gram(rows: Sequence[Tensor]) -> Tensor:
    return _sum([one[::SAMPLED].T @ one[::SAMPLED] for one in rows])


def _inverse(gram: Tensor, ridge: float) -> Tensor:
    return torch.cholesky_inverse(factorise(gram.double(), ridge).lower).to(gram.dtype)


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(values)).sum(0)


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))
