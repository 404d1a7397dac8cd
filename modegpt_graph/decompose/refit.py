"""Solve a consumer again, against the Gram matrix of everything that it really gets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modegpt_graph.decompose.numerics import check_finite, check_gram, energy, factorise, mean_diagonal, ratio_of


@dataclass(frozen=True)
class Refit:
    """weight: (K, D) float64.   bias: (D,) or None.   relative_error: ‖target − X B Ŵ − b̂‖² / ‖target‖²."""

    weight: Tensor
    bias: Tensor | None
    relative_error: float


def refit(
    gram: Tensor,
    basis: Tensor,
    weight: Tensor,
    *,
    ridge: float,
    bias: Tensor | None = None,
    prior: Tensor | None = None,
    cross: Tensor | None = None,
    target: Tensor | None = None,
) -> Refit:
    """The Ŵ (and b̂) that minimise ‖X W + b − X B Ŵ − b̂‖² + λ‖B(Ŵ − prior)‖².

    gram: (N, N) of the full input X of the consumer (all heads side by side), or (N + 1, N + 1) of [X, 1], which a bias
    needs.
    basis: (N, K), or (H, d, k) blocks on a diagonal, or (K,) column indices.   weight: (N, D).   bias: (D,).
    prior: (K, D) what the ridge pulls towards; by default the projection of W on the basis, so that a basis of full
    rank gives the original back at every ridge.   ridge: λ relative to the mean diagonal.
    cross, target: for an input X that already drifted from the original X₀: Xᵀ X₀ and X₀ᵀ X₀, augmented like `gram`;
    then X₀ W + b is fitted from X.
    Raises NumericalError for entries that are not finite.   Source: least squares; MoDeGPT's Ŵ_down is the case of
    column indices.
    """
    gram, weight = check_gram(gram), weight.double()
    check_finite(weight, "weight")
    if (cross is None) != (target is None):
        raise ValueError("cross and target belong together")
    has_drifted = cross is not None
    cross = gram if cross is None else cross.double()
    target = gram if target is None else check_gram(target, "target gram")
    check_finite(cross, "cross gram")
    features = weight.shape[0]
    if gram.shape[0] not in (features, features + 1) or cross.shape != gram.shape or target.shape != gram.shape:
        raise ValueError(f"gram {tuple(gram.shape)} fits no weight {tuple(weight.shape)}: it needs N or N + 1 rows")
    if bias is not None and gram.shape[0] == features:
        raise ValueError(
            "a bias is refitted from the Gram matrix of [X, 1]: one more row and column than the weight has"
        )
    total, mean, target_mean = _centre_sums(gram, cross, target, weight, bias)
    gram, cross, target = (_centred(sums, bias is not None, features) for sums in (gram, cross, target))

    spread = _spread(basis, features)
    unit = mean_diagonal(gram)
    metric = spread.lift(spread.lift(gram).mT)  # Bᵀ C B
    own = spread.own()
    lifted = spread.lift(weight)
    start = prior.double() if prior is not None else lifted if own is None else torch.linalg.solve(own, lifted)
    pull = spread.lift(cross @ weight) - metric @ start
    # Solved for the step away from the prior, in the metric BᵀB, so that the ridge acts on features, not on
    # coefficients.
    root = None if own is None else factorise(own, 0.0, "basis").lower
    whitened, wanted = metric, pull
    if root is not None:
        half = torch.linalg.solve_triangular(root, metric, upper=False)
        whitened = torch.linalg.solve_triangular(root, half.mT, upper=False)
        wanted = torch.linalg.solve_triangular(root, pull, upper=False)
    lower = factorise((whitened + whitened.mT) / 2, ridge, unit=unit).lower
    step = torch.cholesky_solve(wanted, lower)
    fitted = start + (step if root is None else torch.linalg.solve_triangular(root.mT, step, upper=True))

    if has_drifted:
        gained = 2 * (fitted * spread.lift(cross @ weight)).sum() - energy(metric, fitted)
        error = (energy(target, weight) - gained).item()
    else:  # the same figure without the cancellation of three large numbers
        error = energy(gram, weight - spread.expand(fitted)).item()
    if bias is not None:
        bias = bias.double() + target_mean @ weight - mean @ spread.expand(fitted)
    return Refit(fitted, bias, ratio_of(error, total))


def _centre_sums(
    gram: Tensor, cross: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[float, Tensor, Tensor]:
    """‖X₀ W + b‖² and the means of X and X₀ (zeros without a bias)."""
    features = weight.shape[0]
    if bias is None:
        nothing = torch.zeros(features, dtype=torch.float64)
        return float(energy(target[:features, :features], weight)), nothing, nothing
    augmented = torch.cat([weight, bias.double()[None]])
    tokens = gram[-1, -1].clamp_min(1e-300)
    return float(energy(target, augmented)), gram[:features, -1] / tokens, target[:features, -1] / tokens


def _centred(sums: Tensor, centre: bool, features: int) -> Tensor:
    if not centre:
        return sums[:features, :features]
    tokens = sums[-1, -1].clamp_min(1e-300)
    return sums[:features, :features] - torch.outer(sums[:features, -1], sums[-1, :features]) / tokens


class _Spread:
    """A basis (N, K) by what is needed of it; kept apart so that blocks and indices cost no (N, K) product."""

    def lift(self, matrix: Tensor) -> Tensor:
        """Bᵀ·matrix."""
        raise NotImplementedError

    def expand(self, matrix: Tensor) -> Tensor:
        """B·matrix."""
        raise NotImplementedError

    def own(self) -> Tensor | None:
        """Bᵀ B; None where it is the identity."""
        raise NotImplementedError


class _Dense(_Spread):
    def __init__(self, basis: Tensor) -> None:
        self.basis = basis.double()

    def lift(self, matrix: Tensor) -> Tensor:
        return self.basis.mT @ matrix

    def expand(self, matrix: Tensor) -> Tensor:
        return self.basis @ matrix

    def own(self) -> Tensor:
        return self.basis.mT @ self.basis


class _Blocks(_Spread):
    def __init__(self, basis: Tensor) -> None:
        self.basis = basis.double()  # (H, d, k)

    def lift(self, matrix: Tensor) -> Tensor:
        heads, size, _ = self.basis.shape
        return (self.basis.mT @ matrix.reshape(heads, size, -1)).flatten(0, 1)

    def expand(self, matrix: Tensor) -> Tensor:
        heads, _, rank = self.basis.shape
        return (self.basis @ matrix.reshape(heads, rank, -1)).flatten(0, 1)

    def own(self) -> Tensor:
        return torch.block_diag(*(self.basis.mT @ self.basis))


class _Columns(_Spread):
    def __init__(self, kept: Tensor, features: int) -> None:
        self.kept, self.features = kept, features

    def lift(self, matrix: Tensor) -> Tensor:
        return matrix[self.kept]

    def expand(self, matrix: Tensor) -> Tensor:
        full = matrix.new_zeros(self.features, matrix.shape[1])
        full[self.kept] = matrix
        return full

    def own(self) -> None:
        return None


def _spread(basis: Tensor, features: int) -> _Spread:
    if basis.ndim == 1 and not basis.is_floating_point():
        return _Columns(basis, features)
    if basis.ndim == 2 and basis.shape[0] == features:
        return _Dense(basis)
    if basis.ndim == 3 and basis.shape[0] * basis.shape[1] == features:
        return _Blocks(basis)
    raise ValueError(f"basis {tuple(basis.shape)} is neither (N, K), (H, d, k) nor indices for N = {features}")
