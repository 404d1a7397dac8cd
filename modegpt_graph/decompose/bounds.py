"""Propositions 1 to 3: how large a decomposition's squared error can be at most."""

import torch
from torch import Tensor

from modegpt_graph.decompose.numerics import check_gram, check_rank, factorise


def nystrom_residual(gram: Tensor, kept: Tensor) -> Tensor:
    """C − C S (Sᵀ C S)⁻¹ Sᵀ C, what the kept columns do not explain of the Gram matrix (N, N)."""
    gram = check_gram(gram)
    across = gram[kept]  # (k, N)
    pulled = torch.linalg.solve_triangular(factorise(across[:, kept], 0.0).lower, across, upper=False)
    return gram - pulled.mT @ pulled


def nystrom_bound(gram: Tensor, down: Tensor, kept: Tensor) -> float:
    """V_I ≤ ‖W_down‖₂² · ‖C⁻¹‖₂ · ‖C − C S (Sᵀ C S)⁻¹ Sᵀ C‖_F², infinite for a singular C.

    gram: (N, N).   down: (N, D).   kept: (k,) columns. Bounds the squared error of a refit without ridge.
    Source: MoDeGPT (arXiv 2408.09632), theorem 1 and proposition 1.
    """
    residual = nystrom_residual(gram, kept)
    values = torch.linalg.eigvalsh(gram.double())
    smallest, largest = float(values[0]), float(values[-1])
    if smallest <= len(values) * torch.finfo(torch.float64).eps * largest:
        return float("inf")
    return _spectral(down) ** 2 / smallest * float(residual.square().sum())


def nystrom_trace_bound(gram: Tensor, down: Tensor, kept: Tensor) -> float:
    """V_I ≤ ‖W_down‖₂² · tr(C − C S (Sᵀ C S)⁻¹ Sᵀ C), tighter than `nystrom_bound` and finite for a singular C.

    The refitted error is tr(Wᵀ R W) with R that residual, because C^{1/2}(I − S(SᵀCS)⁻¹SᵀC) squares to R.
    """
    return _spectral(down) ** 2 * float(nystrom_residual(gram, kept).trace().clamp_min(0))


def cr_bound(query_grams: Tensor, key_gram: Tensor, rank: int, *, block_size: int = 1) -> float:
    """V_II ≤ b · ((d − k)/d)² · tr C_q · tr C_k, for the `rank` columns of largest score in blocks of b.

    query_grams: (d, d), or (g, d, d) of the heads that share the key: C_q is their sum.   key_gram: (d, d).
    Holds for the paper's score. For b = 1 it is the paper's bound; a block's score is at least a 1/√b of the sum of its
    columns' scores, which is where the factor b comes from.
    Source: MoDeGPT (arXiv 2408.09632), proposition 2, for single columns; the factor for blocks is ours.
    """
    summed = query_grams.double() if query_grams.ndim == 2 else query_grams.double().sum(0)
    d = key_gram.shape[-1]
    if not 0 <= rank <= d:
        check_rank(rank, d)
    share = (d - rank) / d
    return block_size * share**2 * float(summed.trace()) * float(key_gram.double().trace())


def cr_residual(query_gram: Tensor, key_gram: Tensor, kept: Tensor) -> float:
    """‖C_q^{1/2}(I − S Sᵀ)C_k^{1/2}‖²_F, the left half of proposition 2: the exact squared error of the logits.

    query_gram, key_gram: (d, d).   kept: (k,) columns.
    """
    dropped = torch.ones(len(key_gram), dtype=torch.bool)
    dropped[kept] = False
    return float((query_gram.double()[dropped][:, dropped] * key_gram.double()[dropped][:, dropped]).sum().clamp_min(0))


def svd_bound(spectrum: Tensor, rank: int) -> float:
    """V_III ≤ (1 − k/d) · Σ σ_i², from V_III = Σ_{i>k} σ_i², reached when the spectrum is flat.

    spectrum: (d,) singular values of the pair in the metric of its input.
    Source: Eckart and Young (1936); the tail of a descending list is at most its share of the sum.
    """
    d = len(spectrum)
    if not 0 <= rank <= d:
        check_rank(rank, d)
    return (d - rank) / d * float(spectrum.double().square().sum())


def svd_product_bound(input_gram: Tensor, value: Tensor, output: Tensor, rank: int) -> float:
    """V_III ≤ ‖W_o‖₂² · Σ_{i>k} σ_i(C^{1/2} W_v)², the bound of the value matrix alone.

    input_gram: (D, D).   value: (D, d).   output: (d, E), or (d, g·E) for the stacked heads of a group.
    """
    value = value.double()
    inner = value.mT @ check_gram(input_gram) @ value
    values = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp_min(0)
    check_rank(rank, len(values))
    return _spectral(output) ** 2 * float(values[: len(values) - rank].sum())


def _spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), ord=2))
