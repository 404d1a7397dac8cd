"""Type II: choose query/key columns, in whole blocks, and measure what the attention logits lose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modegpt_graph.decompose.logits import SCALE_RIDGE, Kinds, LogitsForm, Scale, quarter_turn
from modegpt_graph.decompose.numerics import RankError, factorise

Score = Literal["paper", "energy", "greedy"]


@dataclass(frozen=True)
class Cr:
    """Kept columns of every group.

    kept: (G, k) columns, ascending.
    query_factor: (G, g, k, k) or None: the kept query columns are multiplied by it from the right, head by head. It
    scales (and with `complex` turns) every block, which rotary embedding commutes with, so it can be folded into the
    query projection.
    relative_error: Σ‖Q Kᵀ − Q̂ K̂ᵀ‖² / Σ‖Q Kᵀ‖² over all groups, heads and pairs of tokens.   group_errors: (G,) the
    same.
    """

    kept: Tensor
    query_factor: Tensor | None
    relative_error: float
    group_errors: Tensor


@dataclass(frozen=True)
class CrCurve:
    """The error at every rank on the way down from all columns, the same counts in every group.

    counts: (T + 1, kinds) blocks kept of each kind.   columns: (T + 1,) columns kept, descending.
    errors: (T + 1,) relative squared error.   dropped: (T, G) the block that goes in each step, in every group.
    """

    counts: Tensor
    columns: Tensor
    errors: Tensor
    dropped: Tensor

    def counts_for(self, rank: int) -> tuple[int, ...]:
        """Blocks of each kind to keep so that at most `rank` columns stay, as many as the blocks allow."""
        return tuple(int(count) for count in self.counts[self.step_at(rank)])

    def error_at(self, rank: int) -> float:
        """Relative squared error with at most `rank` columns kept."""
        return float(self.errors[self.step_at(rank)])

    def step_at(self, rank: int) -> int:
        """The first step with at most `rank` columns left, the last one where there is none."""
        few = self.columns <= rank
        return int(few.nonzero()[0]) if bool(few.any()) else len(self.columns) - 1


def cr(
    query_grams: Tensor,
    key_grams: Tensor,
    blocks: Sequence[Tensor],
    counts: Sequence[int],
    *,
    score: Score = "paper",
    scale: Scale = "none",
) -> Cr:
    """Keep counts[i] blocks of kind i in every group, the same ones in queries and keys.

    query_grams: (G, g, d, d) Gram matrices of the queries of every head after all that stands before the product.
    key_grams: (G, d, d).   blocks: one (n, b) tensor of column indices per kind (rotary pairs, free columns, …), which
    together name every column once.
    score: `paper` is sqrt(Σ ‖C_q^{1/2}[:, i]‖²‖C_k^{1/2}[:, i]‖²) over a block's columns and the group's heads;
    `energy` the exact ‖Q_b K_bᵀ‖² of a block; `greedy` drops one by one what adds least to the true error, cross terms
    included.
    scale: fits a coefficient per kept block and head by least squares on the logits; `complex` also turns pairs.
    Raises RankError for counts that the blocks cannot give, NumericalError for Gram matrices that are none.
    Source: MoDeGPT (arXiv 2408.09632), algorithm 2, for `paper`.
    """
    kinds = Kinds.of(blocks, key_grams.shape[-1])
    if len(counts) != len(kinds.sizes):
        raise RankError(f"{len(counts)} counts for {len(kinds.sizes)} kinds of blocks")
    for size, available, count in zip(kinds.sizes, kinds.available, counts, strict=True):
        if not 0 <= count <= available:
            raise RankError(f"{count} blocks of {size} columns asked for where there are {available}")
    if not any(counts):
        raise RankError("no column would be kept")
    problem = LogitsForm.of(query_grams, key_grams, kinds, scale)
    present, *_ = _descend(problem, kinds, list(counts), score)
    d, group_count = key_grams.shape[-1], key_grams.shape[0]
    columns = torch.zeros(group_count, d, dtype=torch.bool)
    for group in range(group_count):
        for block in present[group].nonzero().flatten().tolist():
            columns[group, kinds.members[block]] = True
    kept = columns.nonzero()[:, 1].view(group_count, -1)
    residual = problem.residual(present)
    errors = problem.error(residual)
    group_errors = torch.where(problem.totals > 0, errors / problem.totals, torch.zeros_like(errors))
    factor = None if scale == "none" else _query_factor(problem, residual, kinds, kept)
    return Cr(kept, factor, _share(errors, problem.totals), group_errors)


def cr_curve(
    query_grams: Tensor,
    key_grams: Tensor,
    blocks: Sequence[Tensor],
    *,
    score: Score = "paper",
    scale: Scale = "none",
) -> CrCurve:
    """The error at every rank, from all columns down to none. Arguments as in `cr`.

    With several kinds each step drops a block, in every group, of the kind whose columns cost least.
    """
    kinds = Kinds.of(blocks, key_grams.shape[-1])
    problem = LogitsForm.of(query_grams, key_grams, kinds, scale)
    _, errors, counts, dropped = _descend(problem, kinds, [0] * len(kinds.sizes), score)
    table = torch.tensor(counts)
    columns = table @ torch.tensor(kinds.sizes)
    return CrCurve(table, columns, torch.tensor(errors, dtype=torch.float64), torch.stack(dropped))


def _descend(
    problem: LogitsForm, kinds: Kinds, floors: list[int], score: Score
) -> tuple[Tensor, list[float], list[list[int]], list[Tensor]]:
    """Drop blocks down to `floors` of each kind.

    Returns who is still present (G, n), errors and counts after every step, and the block (G,) that each step dropped.
    """
    group_count, n = problem.column_energy.shape
    present = torch.ones(group_count, n, dtype=torch.bool)
    remaining = list(kinds.available)
    counts, errors, dropped = [list(remaining)], [0.0], []
    static = _static_scores(problem, score)
    state = _State.of(problem)
    while remaining != floors:
        costs = state.costs(present)  # (G, n)
        best: tuple[float, int, Tensor] | None = None
        for kind, size in enumerate(kinds.sizes):
            if remaining[kind] == floors[kind]:
                continue
            ranking = costs if static is None else static
            chosen = ranking.masked_fill(~present | (kinds.kind != kind), torch.inf).argmin(1)
            price = float(costs.gather(1, chosen[:, None]).sum()) / size
            if best is None or price < best[0]:
                best = (price, kind, chosen)
        assert best is not None
        _, kind, chosen = best
        state.drop(chosen)
        dropped.append(chosen)
        present[torch.arange(group_count), chosen] = False
        remaining[kind] -= 1
        counts.append(list(remaining))
        errors.append(_share(problem.error(state.lost), problem.totals))
    return present, errors, counts, dropped


def _static_scores(problem: LogitsForm, score: Score) -> Tensor | None:
    if score == "paper":
        return problem.column_energy
    if score == "energy":
        return problem.form.diagonal(dim1=-2, dim2=-1).sum(1)[:, :: problem.parts]
    if score == "greedy":
        return None
    raise ValueError(f"unknown score {score!r}: paper, energy or greedy")


@dataclass
class _State:
    """What is lost so far, (G, h, n·p), and with fitted coefficients the inverse of the form over what is present."""

    problem: LogitsForm
    lost: Tensor
    inverse: Tensor | None

    @staticmethod
    def of(problem: LogitsForm) -> "_State":
        inverse = None
        if problem.scaled:
            inverse = torch.cholesky_inverse(factorise(problem.form, SCALE_RIDGE, "query/key form").lower)
        return _State(problem, torch.zeros(problem.form.shape[:-1], dtype=torch.float64), inverse)

    def costs(self, present: Tensor) -> Tensor:
        """(G, n) what dropping each block adds to the error; of absent blocks, anything."""
        form, parts = self.problem.form, self.problem.parts
        if self.inverse is None:
            return (form.diagonal(dim1=-2, dim2=-1) + 2 * (form @ self.lost[..., None]).squeeze(-1)).sum(1)
        n = form.shape[-1] // parts
        own = self.inverse.view(*form.shape[:2], n, parts, n, parts).diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)
        own = torch.where(present[:, None, :, None, None], own, torch.eye(parts, dtype=torch.float64))
        coefficients = (self.problem.target() - self.lost).view(*form.shape[:2], n, parts, 1)
        return (coefficients * torch.linalg.solve(own, coefficients)).sum(dim=(1, 3, 4))

    def drop(self, chosen: Tensor) -> None:
        """Drop block chosen[i] of group i."""
        parts = self.problem.parts
        rows = chosen[:, None] * parts + torch.arange(parts)  # (G, p)
        if self.inverse is None:
            self.lost[torch.arange(len(chosen)), 0, rows[:, 0]] = 1.0
            return
        heads, size = self.lost.shape[1:]
        across = self.inverse.gather(2, rows[:, None, :, None].expand(-1, heads, -1, size))  # (G, h, p, n·p)
        own = across.gather(3, rows[:, None, None, :].expand(-1, heads, parts, -1))  # (G, h, p, p)
        coefficients = (self.problem.target() - self.lost).gather(2, rows[:, None].expand(-1, heads, -1))
        pull = torch.linalg.solve(own, across)
        self.lost = self.lost + (pull * coefficients[..., None]).sum(2)
        self.inverse = self.inverse - across.mT @ pull


def _query_factor(problem: LogitsForm, residual: Tensor, kinds: Kinds, kept: Tensor) -> Tensor:
    """(G, g, k, k) the operators that the fitted coefficients stand for, on the kept columns."""
    group_count, heads = residual.shape[:2]
    d = sum(len(columns) for columns in kinds.members)
    coefficients = (problem.target() - residual).view(group_count, heads, -1, problem.parts)
    full = torch.zeros(group_count, heads, d, d, dtype=torch.float64)
    for block, columns in enumerate(kinds.members):
        full[:, :, columns, columns] = coefficients[:, :, block, :1].expand(-1, -1, len(columns))
        if problem.parts == 2 and len(columns) == 2:
            full = full + coefficients[:, :, block, 1, None, None] * quarter_turn(columns, d)
    rows = full.gather(2, kept[:, None, :, None].expand(-1, heads, -1, d))
    return rows.gather(3, kept[:, None, None, :].expand(-1, heads, kept.shape[1], -1))


def _share(errors: Tensor, totals: Tensor) -> float:
    total = float(totals.sum())
    return float(errors.sum()) / total if total > 0 else 0.0
