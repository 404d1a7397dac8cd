"""Backward elimination: what dropping columns costs after the others were refitted, for every rank at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modegpt_graph.decompose.numerics import energy, factorise

SMALLEST_BATCH = 32
ROWS_PER_STEP = 128


@dataclass(frozen=True)
class Elimination:
    """The order in which blocks are dropped, and the error that is left at every number of blocks kept.

    order: (n,) block indices, the first one dropped first, so that the k kept blocks are `order[n - k:]`.
    errors: (n + 1,) relative squared error of the refitted output with k blocks kept; errors[n] = 0.
    ridge: absolute ridge that was used.
    leaves: (n,) Σ of column k of the Cholesky factor squared, columns in the order in which they stay: what features
    k, k + 1, … leave unexplained when k is dropped; None where that factor was not needed.
    """

    order: Tensor
    errors: Tensor
    ridge: float
    leaves: Tensor | None = None

    def kept(self, count: int) -> Tensor:
        """The `count` blocks that are dropped last, ascending."""
        return self.order[len(self.order) - count :].sort().values


def eliminate(
    gram: Tensor,
    weight: Tensor,
    *,
    ridge: float,
    blocks: Tensor | None = None,
    total: float | None = None,
    batch: int | None = None,
) -> Elimination:
    """Drop blocks of columns one by one, each time the one that costs least after the best refit of the rest.

    With G = gram + ridge·I and V the refitted weight of the columns that remain, dropping block b adds
    tr(V_bᵀ ([G⁻¹]_bb)⁻¹ V_b) to the ridge objective ‖X(W − V)‖² + ridge‖W − V‖². G⁻¹ and V are downdated `batch` blocks
    at a time; within a batch the choice is exact among the 2·batch cheapest. `errors` holds ‖X(W − V)‖² without the
    ridge term.

    gram: (N, N) float64.   weight: (N, D).   blocks: (n, b) column indices of blocks that fall together; single columns
    by default.   ridge: relative to the mean diagonal.   total: what errors are relative to; ‖X W‖² by default.
    Time O(N³ + N² D).
    Source: Optimal Brain Surgeon (Hassibi and Stork, 1993) for the cost; the blocked downdate as in GPTQ (arXiv
    2210.17323).
    """
    size = 1 if blocks is None else blocks.shape[1]
    columns = torch.arange(gram.shape[0]) if blocks is None else blocks.flatten()
    count = len(columns) // size
    # Wide enough that the downdates are not bound by memory, narrow enough that choosing within the pool stays cheap.
    batch = max(SMALLEST_BATCH, count // 64) if batch is None else batch
    gram = gram if blocks is None else gram[columns][:, columns]
    weight = weight.double() if blocks is None else weight.double()[columns]
    total = float(energy(gram, weight)) if total is None else total
    factor = factorise(gram, ridge)
    inverse = torch.cholesky_inverse(factor.lower)
    penalty = factor.ridge

    refitted = weight.clone()
    alive = torch.arange(count)  # block behind each block position of `inverse`
    present = torch.ones(count, dtype=torch.bool)
    dropped: list[Tensor] = []
    steps: list[Tensor] = []
    done = 0
    while done < count:
        width = min(batch, count - done)
        chosen = _cheapest(inverse, refitted, present, size, width)
        rows = _columns_of(chosen, size)
        lower = torch.linalg.cholesky(inverse[rows][:, rows])
        spread = torch.linalg.solve_triangular(lower, inverse[rows], upper=False)  # (b, m), rows of L⁻¹ P[B, :]
        pulled = torch.linalg.solve_triangular(lower, refitted[rows], upper=False)  # (b, D)

        # After t columns V becomes V − Y_t U_t, so ‖W − V‖² grows by a cross term and a leading sub-block sum.
        cross = 2 * ((spread @ (weight - refitted)) * pulled).sum(1).cumsum(0)
        product = (spread @ spread.mT) * (pulled @ pulled.mT)
        square = product.cumsum(0).cumsum(1).diagonal()
        objective = pulled.square().sum(1).cumsum(0)
        step = (objective - penalty * (cross + square)).reshape(width, size)[:, -1]
        steps.append(step if not steps else step + steps[-1][-1])

        refitted.addmm_(spread.mT, pulled, alpha=-1)
        inverse.addmm_(spread.mT, spread, alpha=-1)
        dropped.append(alive[chosen])
        present[chosen] = False
        done += width
        if present.sum() < 0.8 * len(present):
            keep = _columns_of(present.nonzero().squeeze(1), size)
            inverse, refitted, weight = inverse[keep][:, keep], refitted[keep], weight[keep]
            alive, present = alive[present], present[present]
    errors = torch.cat([gram.new_zeros(1), *steps]).clamp_min(0).flip(0)
    return Elimination(torch.cat(dropped), errors / total if total > 0 else torch.zeros_like(errors), penalty)


def eliminate_in_order(
    gram: Tensor, weight: Tensor, order: Tensor, *, ridge: float, total: float | None = None
) -> Elimination:
    """`eliminate` for single columns in a given order, the first one dropped first.

    With G = gram + ridge·I = L Lᵀ, columns in the order in which they stay, M = L⁻¹ and U = Lᵀ W: the best refit to the
    first k columns is V_k = M[:k]ᵀ U[:k], and the ridge objective that is left is ‖U[k:]‖². So one factor gives the
    errors at every rank. Time O(N³ + N² D).
    """
    total = float(energy(gram, weight)) if total is None else total
    staying = order.flip(0)
    factor = factorise(gram[staying][:, staying], ridge)
    wanted = weight.double()[staying]
    inverse = torch.linalg.solve_triangular(factor.lower, torch.eye(len(gram), dtype=gram.dtype), upper=False)
    pulled = factor.lower.mT @ wanted
    gains = pulled.square().sum(1)
    # ‖W − V_k‖², which the ridge objective counts and the error does not: V_k grows by M[k]ᵀ U[k].
    left, drift = wanted.clone(), torch.empty_like(gains)
    for start in range(0, len(gram), ROWS_PER_STEP):
        rows, end = slice(start, start + ROWS_PER_STEP), start + ROWS_PER_STEP
        step = inverse[rows, :end]
        products = step @ step.mT
        met = step @ left[:end] - products.tril(-1) @ pulled[rows]  # M[k] (W − V_k)
        drift[rows] = gains[rows] * products.diagonal() - 2 * (pulled[rows] * met).sum(1)
        left[:end] -= step.mT @ pulled[rows]
    objective = torch.cat([gains.flip(0).cumsum(0).flip(0), gains.new_zeros(1)])
    distance = wanted.square().sum() + torch.cat([drift.new_zeros(1), drift.cumsum(0)])
    errors = (objective - factor.ridge * distance).clamp_min(0)
    errors[-1] = 0.0  # nothing is dropped; what is left there is rounding
    shares = errors / total if total > 0 else torch.zeros_like(errors)
    return Elimination(order, shares, factor.ridge, torch.linalg.vecdot(factor.lower, factor.lower, dim=0))


def _columns_of(positions: Tensor, size: int) -> Tensor:
    return (positions[:, None] * size + torch.arange(size)).flatten()


def _cheapest(inverse: Tensor, refitted: Tensor, present: Tensor, size: int, width: int) -> Tensor:
    """Positions of `width` blocks in the order of exact greedy elimination within a pool of the cheapest."""
    if size == 1:
        costs = refitted.square().sum(1) / inverse.diagonal()
    else:
        count = len(present)
        own = inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (n, b, b)
        own = torch.where(present[:, None, None], own, torch.eye(size, dtype=own.dtype))
        values = refitted.view(count, size, -1)
        costs = (values * torch.linalg.solve(own, values)).sum(dim=(1, 2))
    costs = costs.masked_fill(~present, torch.inf)
    pool = costs.topk(min(2 * width, int(present.sum())), largest=False).indices
    rows = _columns_of(pool, size)
    local = inverse[rows][:, rows]
    outer = refitted[rows] @ refitted[rows].mT
    free = torch.ones(len(pool), dtype=torch.bool)
    pick = _single_picks if size == 1 else _block_picks
    return pool[torch.tensor(pick(local, outer, free, size, width))]


def _single_picks(local: Tensor, outer: Tensor, free: Tensor, size: int, width: int) -> list[int]:
    """`_block_picks` for blocks of one column, where every step is three rank-one updates."""
    barred = torch.zeros(len(free), dtype=local.dtype)
    picked = []
    for _ in range(width):
        best = int((outer.diagonal() / local.diagonal() + barred).argmin())
        picked.append(best)
        barred[best] = torch.inf
        row = local[best].clone()
        pull = row / row[best]
        shared = outer[best].clone()
        shared -= pull * (shared[best] / 2)
        outer.addr_(pull, shared, alpha=-1).addr_(shared, pull, alpha=-1)
        local.addr_(pull, row, alpha=-1)
        local[best, best] = 1.0  # rounding leaves a residue around zero; the column is barred from now on
        outer[best, best] = 1.0
    return picked


def _block_picks(local: Tensor, outer: Tensor, free: Tensor, size: int, width: int) -> list[int]:
    """Positions in the pool in greedy order; local is G⁻¹ and outer V Vᵀ over the pool's columns."""
    count = len(free)
    picked = []
    for _ in range(width):
        own = local.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        own = torch.where(free[:, None, None], own, torch.eye(size, dtype=own.dtype))
        gains = outer.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        costs = torch.linalg.solve(own, gains).diagonal(dim1=1, dim2=2).sum(1)
        best = int(costs.masked_fill(~free, torch.inf).argmin())
        picked.append(best)
        free[best] = False
        span = slice(best * size, (best + 1) * size)
        pull = torch.linalg.solve(local[span, span], local[span]).mT  # (pool, b): P[:, b] P_bb⁻¹
        moved = pull @ outer[span]
        outer = outer - moved - moved.mT + pull @ outer[span, span] @ pull.mT
        local = local - pull @ local[span]
    return picked
