"""Type III: the best smaller pair where nothing nonlinear stands between: query/key, or any two linear layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modegpt_graph.decompose.numerics import (
    EPSILON,
    check_gram,
    check_rank,
    energy,
    mean_diagonal,
    ratio_of,
    square_root,
)

UNSEEN_RIDGE = 1e-8


@dataclass(frozen=True)
class QueryKey:
    """Maps from the original to the smaller query and key features.

    query_map, key_map: (G, d, k); Q_h·query_map and K·key_map are the new queries and keys.
    relative_error: Σ_h ‖Q_h Kᵀ − Q̂_h K̂ᵀ‖² / Σ_h ‖Q_h Kᵀ‖², over all groups.
    errors: (d + 1,) the same at every rank.   spectrum: (G, d) singular values, descending.
    """

    query_map: Tensor
    key_map: Tensor
    relative_error: float
    errors: Tensor
    spectrum: Tensor


@dataclass(frozen=True)
class LinearPair:
    """first (D, k) and second (k, E) in place of (D, N) and (N, E).   errors: relative error at every rank 0..full."""

    first: Tensor
    second: Tensor
    relative_error: float
    errors: Tensor
    spectrum: Tensor


def query_key_svd(query_grams: Tensor, key_grams: Tensor, rank: int) -> QueryKey:
    """The optimum of Σ_h ‖Q_h Kᵀ − Q_h A_q (K A_k)ᵀ‖² over all pairs (A_q, A_k) of a group that have `rank` columns.

    query_grams: (G, g, d, d).   key_grams: (G, d, d).   Only Σ_h Q_hᵀQ_h matters: with C_q that sum and C_q^{1/2}
    C_k^{1/2} = U Σ Vᵀ the loss is the sum of the squared singular values beyond `rank`. A_q = C_k^{1/2} V_k Σ_k^{-1/2}
    and A_k = C_q^{1/2} U_k Σ_k^{-1/2}: no Gram matrix is inverted. Directions that the text never used count as tiny,
    not as zero, so that full rank stays lossless for other texts.
    Raises RankError where `rank` is not in 1..d, NumericalError for Gram matrices that are none.
    Source: MoDeGPT (arXiv 2408.09632), type III; the closed form is Eckart–Young in the metric of the Gram matrices.
    """
    queries, keys = check_gram(query_grams, "query gram"), check_gram(key_grams, "key gram")
    if queries.ndim != 4 or keys.ndim != 3 or queries.shape[2:] != keys.shape[1:] or len(queries) != len(keys):
        raise ValueError(f"query grams {tuple(queries.shape)} do not fit key grams {tuple(keys.shape)}")
    d = keys.shape[-1]
    check_rank(rank, d)
    summed = queries.sum(1)
    query_root = torch.stack([square_root(_seen(gram)) for gram in summed])
    key_root = torch.stack([square_root(_seen(gram)) for gram in keys])
    left, spectrum, right = torch.linalg.svd(query_root @ key_root)  # (G, d, d), (G, d), (G, d, d)
    scale = spectrum.clamp_min(d * EPSILON * spectrum[:, :1]).rsqrt()[:, None]
    query_full, key_full = (key_root @ right.mT) * scale, (query_root @ left) * scale
    query_map, key_map = query_full[..., :rank], key_full[..., :rank]

    totals = (summed * keys).sum(dim=(1, 2))
    lost = torch.eye(d, dtype=torch.float64) - query_map @ key_map.mT
    error = float(((lost.mT @ summed @ lost) * keys).sum())
    errors = _errors_at_every_rank(summed, keys, query_full, key_full, totals)
    return QueryKey(query_map, key_map, ratio_of(error, float(totals.sum())), errors, spectrum)


def linear_pair(gram: Tensor, first: Tensor, second: Tensor, rank: int) -> LinearPair:
    """The optimum of ‖X W1 W2 − X Ŵ1 Ŵ2‖² over all Ŵ1 (D, rank), Ŵ2 (rank, E): principal components of the output.

    gram: (D, D) = Xᵀ X.   first: (D, N).   second: (N, E).   With V_k the leading eigenvectors of (W1 W2)ᵀ C (W1 W2):
    Ŵ1 = W1 W2 V_k and Ŵ2 = V_kᵀ. Nothing is inverted.
    Raises RankError where `rank` is not in 1..N (ranks beyond D or E change nothing more and are filled with zeros).
    Source: MoDeGPT (arXiv 2408.09632), type III, for an MLP without an activation.
    """
    gram, first, second = check_gram(gram), first.double(), second.double()
    features, outputs = first.shape[1], second.shape[1]
    check_rank(rank, features)
    product = first @ second
    values, vectors = torch.linalg.eigh(_symmetric(product.mT @ gram @ product))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    width = min(features, outputs)
    basis = vectors[:, : min(rank, outputs)]
    if rank > outputs:
        basis = torch.cat([basis, basis.new_zeros(outputs, rank - outputs)], dim=1)
    total = float(energy(gram, product))
    error = ratio_of(float(energy(gram, product - product @ basis @ basis.mT)), total)
    kept = torch.cat([values.new_zeros(1), values[:width].cumsum(0), values[:width].sum().expand(features - width)])
    errors = (1 - kept / kept[-1]).clamp_min(0) if total > 0 else torch.zeros_like(kept)
    return LinearPair(product @ basis, basis.mT, error, errors, values[:width].sqrt())


def _errors_at_every_rank(queries: Tensor, keys: Tensor, left: Tensor, right: Tensor, totals: Tensor) -> Tensor:
    """(d + 1,) ‖Q (I − Σ_{i≤k} a_i b_iᵀ) Kᵀ‖² over all groups, relative: the spectrum's tail without the ridge."""
    hit = ((left.mT @ queries @ keys) * right.mT).sum(-1).cumsum(-1)  # (G, d)
    overlap = (left.mT @ queries @ left) * (right.mT @ keys @ right)
    square = overlap.cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)
    lost = (totals[:, None] - 2 * hit + square).sum(0).clamp_min(0)
    total = totals.sum()
    errors = torch.cat([total[None], lost])
    return errors / total if total > 0 else torch.zeros_like(errors)


def _seen(gram: Tensor) -> Tensor:
    return gram + UNSEEN_RIDGE * mean_diagonal(gram) * torch.eye(gram.shape[-1], dtype=gram.dtype)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
