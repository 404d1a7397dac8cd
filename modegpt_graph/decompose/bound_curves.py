"""Propositions 1 to 3 at every rank at once, for what was really kept: what `bounds` says of one rank, cheaply.

Each bound holds for the ridge that the refit used and for the selection that was made, which the paper's forms do not.
All are squared errors, not relative ones.
"""

import torch
from torch import Tensor

from modegpt_graph.decompose.cr import CrCurve, Score
from modegpt_graph.decompose.logits import Scale
from modegpt_graph.decompose.numerics import check_gram, factorise


def nystrom_bounds(gram: Tensor, weight: Tensor, order: Tensor, ridge: float, leaves: Tensor | None = None) -> Tensor:
    """(N + 1,) V_I ≤ ‖W‖₂² · tr(C_RR − C_RS (C_SS + λI)⁻¹ C_SR), S being the k columns that `order` drops last.

    gram: (N, N), centred where a bias is refitted too.   weight: (N, D).   order: (N,) columns, the first one dropped
    first.   ridge: λ, absolute; the refit is drawn towards the kept rows of W. With L Lᵀ = C + λI, columns in the order
    in which they stay, the trace is Σ_{j ≥ k} ‖L[:, j]‖² − λ (N − k): one factor serves all ranks.
    leaves: (N,) those ‖L[:, j]‖² where they are known.
    For λ = 0 this is never above proposition 1, V_I ≤ ‖W‖₂² ‖C⁻¹‖₂ ‖C − C S (Sᵀ C S)⁻¹ Sᵀ C‖_F², and unlike it finite
    for a singular C.   Source: MoDeGPT (arXiv 2408.09632), theorem 1 and proposition 1.
    """
    if leaves is None:
        staying = order.flip(0)
        factor = factorise(gram[staying][:, staying], ridge, unit=1.0)
        leaves = factor.lower.square().sum(0)
        ridge = factor.ridge
    return spectral_square(weight) * _tails(leaves - ridge)


def cr_bounds(
    query_grams: Tensor, key_grams: Tensor, blocks: list[Tensor], curve: CrCurve, *, score: Score, scale: Scale
) -> Tensor:
    """(T + 1,) for every step of `curve`: V_II ≤ Σ_groups (Σ_{i dropped} √(C_q,ii C_k,ii))², the proof's first step.

    query_grams: (G, g, d, d), C_q is their sum over g.   key_grams: (G, d, d).   blocks: as for `cr_curve`.
    With blocks of one size b it is at most what proposition 2 has, V_II ≤ c · ((d − k)/d)² · tr C_q · tr C_k, where
    that holds: c = b for the paper's score, because a block's score is at least 1/√b of the sum of its columns' scores;
    c = 1 for the energy of blocks and for greedy steps, because a step adds at most the smallest ‖Q_b K_bᵀ‖ that is
    left. Greedy steps with fitted coefficients have no such guarantee.
    Source: MoDeGPT (arXiv 2408.09632), proposition 2, for the paper's score, single columns and one head.
    """
    dropped = column_scores(query_grams, key_grams)  # (G, d)
    by_block = torch.stack([dropped[:, columns].sum(1) for kind in blocks for columns in kind], dim=1)  # (G, n)
    gone = by_block.gather(1, curve.dropped.T).cumsum(1)  # (G, T)
    bounds = torch.cat([gone.new_zeros(1), gone.square().sum(0)])
    if len(blocks) == 1 and not (score == "greedy" and scale != "none"):
        constant = blocks[0].shape[1] if score == "paper" else 1
        d = key_grams.shape[-1]
        traces = query_grams.sum(1).diagonal(dim1=1, dim2=2).sum(1) * key_grams.diagonal(dim1=1, dim2=2).sum(1)
        shares = (d - curve.columns.double()) / d
        bounds = torch.minimum(bounds, constant * shares.square() * traces.sum())
    return bounds


def column_scores(query_grams: Tensor, key_grams: Tensor) -> Tensor:
    """(G, d) ‖C_q^{1/2} e_i‖ · ‖C_k^{1/2} e_i‖, which bounds what column i adds to the logits of its group."""
    summed = check_gram(query_grams).sum(1).diagonal(dim1=1, dim2=2)
    return (summed.clamp_min(0) * check_gram(key_grams).diagonal(dim1=1, dim2=2).clamp_min(0)).sqrt()


def query_key_bounds(query_grams: Tensor, key_grams: Tensor) -> Tensor:
    """(d + 1,) V ≤ Σ_groups min((1 − k/d) Σ σ², ‖C_q‖₂ Σ_{i>k} λ_i(C_k), ‖C_k‖₂ Σ_{i>k} λ_i(C_q)).

    σ are the singular values of C_q^{1/2} C_k^{1/2}, whose squares sum to tr(C_q C_k).   query_grams: (G, g, d, d).
    key_grams: (G, d, d).   Source: proposition 3 for the pair of query and key; σ_i(AB) ≤ ‖A‖ σ_i(B).
    """
    queries, keys = check_gram(query_grams).sum(1), check_gram(key_grams)
    of_queries, of_keys = (torch.linalg.eigvalsh(gram).clamp_min(0).flip(1) for gram in (queries, keys))
    flat = _flat((queries * keys).sum(dim=(1, 2)), keys.shape[-1])  # (G, d + 1)
    by_keys = of_queries[:, :1] * _tails(of_keys)
    by_queries = of_keys[:, :1] * _tails(of_queries)
    return torch.minimum(flat, torch.minimum(by_keys, by_queries)).sum(0)


def value_output_bounds(head_grams: Tensor, output: Tensor, basis: Tensor) -> Tensor:
    """(d + 1,) V_III ≤ Σ_h ‖W_h‖₂² tr((I − B_k B_kᵀ) C_h), each head's output fitted again to the first k directions.

    head_grams: (G, g, d, d).   output: (G, g, d, D).   basis: (G, d, d) orthonormal, nested. Where a group has one head
    the basis is the optimum and V_III ≤ (1 − k/d) Σ σ² holds as well, with σ those of C^{1/2} W: the smaller counts.
    Source: MoDeGPT (arXiv 2408.09632), proposition 3; Eckart and Young (1936).
    """
    grams, output = check_gram(head_grams), output.double()
    along = ((grams @ basis[:, None]) * basis[:, None]).sum(2)  # (G, g, d): energy of a head in each direction
    sizes = torch.linalg.eigvalsh(output @ output.mT)[..., -1:].clamp_min(0)  # (G, g, 1)
    bounds = _tails(sizes * along)
    if grams.shape[1] == 1:
        totals = ((grams @ output) * output).sum(dim=(2, 3))  # (G, 1)
        bounds = torch.minimum(bounds, _flat(totals, grams.shape[-1]))
    return bounds.sum(dim=(0, 1))


def projection_bound(gram: Tensor, weight: Tensor, basis: Tensor, prior: Tensor, ridge: float) -> float:
    """V_III ≤ ‖W‖₂² tr((I − P) C (I − P)) + λ ‖P W − prior‖², for a consumer of all heads that is fitted again at once.

    gram: (N, N), centred where a bias is refitted too.   weight: (N, D).   basis: (H, d, k) of every head, P projects
    onto them.   prior: (N, D) what the ridge draws the fitted output towards.   ridge: λ, absolute.
    The refit is at least as good, ridge term included, as reading P W instead of W, which is the right side.
    """
    orthonormal = torch.linalg.qr(basis.double()).Q  # (H, d, k)
    heads, size, _ = basis.shape
    blocks = torch.arange(heads * size).view(heads, size)
    own = gram[blocks[:, :, None], blocks[:, None, :]]  # (H, d, d)
    kept = ((own @ orthonormal) * orthonormal).sum()
    left = (own.diagonal(dim1=1, dim2=2).sum() - kept).clamp_min(0)
    projected = (orthonormal @ (orthonormal.mT @ weight.view(heads, size, -1))).flatten(0, 1)
    return float(spectral_square(weight) * left + ridge * (projected - prior).square().sum())


def spectral_square(matrix: Tensor) -> Tensor:
    """‖W‖₂², from the eigenvalues of the smaller of W Wᵀ and Wᵀ W."""
    matrix = matrix.double()
    inner = matrix.mT @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.mT
    return torch.linalg.eigvalsh(inner)[-1].clamp_min(0)


def _flat(totals: Tensor, d: int) -> Tensor:
    """(…, d + 1) (1 − k/d) of each total."""
    return totals[..., None] * (1 - torch.arange(d + 1, dtype=torch.float64) / d)


def _tails(energies: Tensor) -> Tensor:
    """(…, n + 1) Σ_{i ≥ k} for k = 0..n along the last axis, never negative."""
    sums = energies.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums, sums.new_zeros(*sums.shape[:-1], 1)], dim=-1).clamp_min(0)
