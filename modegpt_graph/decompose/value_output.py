"""Type III for attention outputs: a smaller value basis per group, shared by the output heads of the group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modegpt_graph.decompose.numerics import (
    check_finite,
    check_gram,
    check_rank,
    energy,
    factorise,
    inverse_square_root,
    ratio_of,
    square_root,
)

RIDGE = 1e-8


@dataclass(frozen=True)
class ValueOutput:
    """A basis per group and the refitted output heads.

    basis: (G, d, k), orthonormal columns: new values are V·basis, and what head h attends to is O_h·basis.
    output: (G, g, k, D).   relative_error: Σ‖O_h W_h − O_h B Ŵ_h‖² / Σ‖O_h W_h‖² over groups and heads.
    errors: (d + 1,) the same at every rank, for the closed form (refined bases do better still).
    spectrum: (G, d) share of the group's output energy that each further direction explains, descending up to rounding.
    """

    basis: Tensor
    output: Tensor
    relative_error: float
    errors: Tensor
    spectrum: Tensor


@dataclass(frozen=True)
class PaperValueOutput:
    """basis (G, d, k), value = W_v·basis (G, D, k) and output (G, g, k, E).

    errors: (d + 1,) relative error at every rank.
    """

    basis: Tensor
    value: Tensor
    output: Tensor
    relative_error: float
    errors: Tensor


def value_output_svd(head_grams: Tensor, output: Tensor, rank: int, *, sweeps: int = 3) -> ValueOutput:
    """The basis B of each group that minimises Σ_h ‖C_h^{1/2} (W_h − B Ŵ_h)‖², with Ŵ_h refitted to it.

    head_grams: (G, g, d, d) Gram matrices C_h of what attention puts out per head (position mixing included), which is
    exact where the paper's C of the layer input is not.   output: (G, g, d, D) the rows of the output matrix that head
    h meets. Where the C_h of a group are equal, or g = 1, this is the exact optimum (Eckart–Young on C^{1/2}[W_1 …
    W_g]). Else the better of two closed forms, each exact in the equal case, and `sweeps` rounds of alternating least
    squares from there, which never make it worse and of which the first three gain nearly all.
    Raises RankError where `rank` is not in 1..d, NumericalError for Gram matrices that are none.
    Source: MoDeGPT (arXiv 2408.09632), algorithm 3, with the second SVD taken over the stacked heads of the group.
    """
    grams, output = check_gram(head_grams, "attention output gram"), output.double()
    check_finite(output, "output weight")
    if grams.ndim != 4 or output.ndim != 4 or grams.shape[:3] != output.shape[:3]:
        raise ValueError(f"head grams {tuple(grams.shape)} do not fit output {tuple(output.shape)}")
    d = grams.shape[-1]
    check_rank(rank, d)
    totals = energy(grams, output).sum(1)  # (G,)
    outer = output @ output.mT  # (G, g, d, d): all that the choice of B needs of the output matrix
    plain, generalised = _mean_gram_basis(grams, outer), _generalised_basis(grams, outer)
    plain_spectrum, generalised_spectrum = (_captured(grams, outer, basis) for basis in (plain, generalised))
    better = generalised_spectrum[:, :rank].sum(1) > plain_spectrum[:, :rank].sum(1)  # (G,)
    full = torch.where(better[:, None, None], generalised, plain)
    spectrum = torch.where(better[:, None], generalised_spectrum, plain_spectrum)

    basis = full[..., :rank]
    for _ in range(sweeps):
        basis = _sweep(grams, outer, basis)
    fitted = fit_outputs(grams, basis, grams @ output)
    error = float(energy(grams, output - basis[:, None] @ fitted).sum())
    total = float(totals.sum())
    left = (totals.sum() - torch.cat([spectrum.new_zeros(1), spectrum.sum(0).cumsum(0)])).clamp_min(0)
    errors = left / total if total > 0 else torch.zeros_like(left)
    shares = spectrum / torch.where(totals > 0, totals, torch.ones_like(totals))[:, None]
    return ValueOutput(basis, fitted, ratio_of(error, total), errors, shares)


def paper_value_output(
    input_gram: Tensor, value: Tensor, output: Tensor, rank: int, *, stacked: bool = True
) -> PaperValueOutput:
    """The paper's algorithm 3 on the Gram matrix of the layer input, for one or several output heads per value head.

    input_gram: (D, D) = Xᵀ X.   value: (G, D, d).   output: (G, g, d, E).   stacked: second SVD over [W_1 … W_g], the
    optimum of Σ_h ‖C^{1/2}(W_v W_h − Ŵ_v Ŵ_h)‖²; without it the paper's grouped variant, which truncates C^{1/2} W_v
    alone. C^{1/2} W_v = U Σ Vᵀ enters only by Σ² and V, the eigenvectors of W_vᵀ C W_v (d, d), so no (D, D) root is
    ever taken.
    Raises as `value_output_svd`.   Source: MoDeGPT (arXiv 2408.09632), algorithm 3 and its section on grouped-query
    attention.
    """
    gram, value, output = check_gram(input_gram, "input gram"), value.double(), output.double()
    d, heads = value.shape[-1], output.shape[1]
    check_rank(rank, d)
    value_gram = value.mT @ gram @ value
    grams = ((value_gram + value_gram.mT) / 2)[:, None].expand(-1, heads, -1, -1)
    if stacked:
        result = value_output_svd(grams, output, rank, sweeps=0)
        basis = result.basis
        return PaperValueOutput(basis, value @ basis, result.output, result.relative_error, result.errors)
    values, vectors = torch.linalg.eigh(grams[:, 0])
    vectors = vectors.flip(-1)
    projected = vectors.mT[:, None] @ output  # (G, g, d, E): in this basis the value features are uncorrelated
    losses = (values.flip(-1).clamp_min(0)[:, None, :] * projected.square().sum(-1)).sum(dim=(0, 1))  # (d,)
    left = torch.cat([losses.flip(0).cumsum(0).flip(0), losses.new_zeros(1)])
    total = float(left[0])
    errors = left / total if total > 0 else torch.zeros_like(left)
    basis = vectors[..., :rank]
    return PaperValueOutput(basis, value @ basis, projected[:, :, :rank], float(errors[rank]), errors)


def _mean_gram_basis(grams: Tensor, outer: Tensor) -> Tensor:
    """(G, d, d) nested orthonormal bases: C̄^{-1/2} times the left singular vectors of C̄^{1/2}[W_1 … W_g]."""
    mean = grams.mean(1)
    summed = outer.sum(1)
    root = square_root(mean)
    _, vectors = torch.linalg.eigh(root @ summed @ root)
    return _orthonormal(inverse_square_root(mean, RIDGE) @ vectors.flip(-1))


def _generalised_basis(grams: Tensor, outer: Tensor) -> Tensor:
    """(G, d, d) as above, from max tr((BᵀC̄B)⁻¹ Bᵀ(Σ C_h W_h W_hᵀ C_h)B): what is captured, in one metric."""
    whiten = inverse_square_root(grams.mean(1), RIDGE)
    _, vectors = torch.linalg.eigh(whiten @ (grams @ outer @ grams).sum(1) @ whiten)
    return _orthonormal(whiten @ vectors.flip(-1))


def _orthonormal(basis: Tensor) -> Tensor:
    """Nested: the first k columns span what they spanned, for every k."""
    return torch.linalg.qr(basis / basis.norm(dim=-2, keepdim=True)).Q


def fit_outputs(grams: Tensor, basis: Tensor, right: Tensor) -> Tensor:
    """(G, g, k, …) least-squares outputs (Bᵀ C_h B)⁻¹ Bᵀ right_h; right_h = C_h W_h gives the heads' own.

    grams: (G, g, d, d).   basis: (G, d, k).   right: (G, g, d, …).
    """
    shared = basis[:, None]
    lower = torch.stack([factorise(gram, 0.0).lower for gram in (shared.mT @ grams @ shared).flatten(0, 1)])
    return torch.cholesky_solve(shared.mT @ right, lower.view(*grams.shape[:2], *lower.shape[1:]))


def _captured(grams: Tensor, outer: Tensor, basis: Tensor) -> Tensor:
    """(G, d) energy of the outputs that each further column of the nested basis explains, summed over the heads."""
    shared = basis[:, None]
    lower = torch.stack([factorise(gram, 0.0).lower for gram in (shared.mT @ grams @ shared).flatten(0, 1)])
    lower = lower.view(*grams.shape[:2], *lower.shape[1:])
    pulled = torch.linalg.solve_triangular(lower, shared.mT @ grams, upper=False)
    return ((pulled @ outer) * pulled).sum(-1).sum(1)


def _sweep(grams: Tensor, outer: Tensor, basis: Tensor, steps: int = 20) -> Tensor:
    """One round of alternating least squares: outputs for this basis, then the basis for these outputs.

    The basis solves, by conjugate gradients, Σ_h C_h B (Ŵ_h Ŵ_hᵀ) = Σ_h C_h W_h Ŵ_hᵀ; with Ŵ_h = F_h W_h both sides
    need W_h W_hᵀ only.
    """
    fit = fit_outputs(grams, basis, grams)  # (G, g, k, d)
    inner = fit @ outer @ fit.mT  # (G, g, k, k)
    right = (grams @ outer @ fit.mT).sum(1)  # (G, d, k)
    left_lower = torch.stack([factorise(gram, RIDGE).lower for gram in grams.mean(1)])
    right_lower = torch.stack([factorise(gram, RIDGE).lower for gram in inner.sum(1)])

    def apply(candidate: Tensor) -> Tensor:
        return (grams @ candidate[:, None] @ inner).sum(1)

    def precondition(residual: Tensor) -> Tensor:
        half = torch.cholesky_solve(residual, left_lower)
        return torch.cholesky_solve(half.mT, right_lower).mT

    residual = right - apply(basis)
    direction = precondition(residual)
    slope = (residual * direction).sum(dim=(1, 2), keepdim=True)
    current = basis
    for _ in range(steps):
        image = apply(direction)
        curvature = (direction * image).sum(dim=(1, 2), keepdim=True)
        length = torch.where(curvature > 0, slope / curvature.clamp_min(1e-300), torch.zeros_like(slope))
        current = current + length * direction
        residual = residual - length * image
        better = precondition(residual)
        following = (residual * better).sum(dim=(1, 2), keepdim=True)
        direction = better + torch.where(slope > 0, following / slope.clamp_min(1e-300), 0.0) * direction
        slope = following
    return _orthonormal(current)
