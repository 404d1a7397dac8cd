"""Type II: choose query/key columns, in whole blocks, and measure what the attention logits lose.

Every figure here comes from one identity. With H = C_q ∘ C_k (Hadamard product; C_q summed over the heads of a group) the logits
of all query/key pairs lose ‖Q D Kᵀ‖² = Σ_ij d_i H_ij d_j when column i is weighed by 1 − d_i: d is 1 on dropped columns, 0 on
kept ones, or a fitted coefficient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modegpt_graph.decompose.numerics import RankError, check_gram, factorise

Score = Literal["paper", "energy", "greedy"]
Scale = Literal["none", "real", "complex"]
SCALE_RIDGE = 1e-6


@dataclass(frozen=True)
class Cr:
    """Kept columns of every group.

    kept: (G, k) columns, ascending.
    query_factor: (G, g, k, k) or None: the kept query columns are multiplied by it from the right, head by head. It scales (and
    with `complex` turns) every block, which rotary embedding commutes with, so it can be folded into the query projection.
    relative_error: Σ‖Q Kᵀ − Q̂ K̂ᵀ‖² / Σ‖Q Kᵀ‖² over all groups, heads and pairs of tokens.   group_errors: (G,) the same.
    """

    kept: Tensor
    query_factor: Tensor | None
    relative_error: float
    group_errors: Tensor


@dataclass(frozen=True)
class CrCurve:
    """The error at every rank on the way down from all columns, the same counts in every group.

    counts: (T + 1, kinds) blocks kept of each kind.   columns: (T + 1,) columns kept, descending.
    errors: (T + 1,) relative squared error.
    """

    counts: Tensor
    columns: Tensor
    errors: Tensor

    def counts_for(self, rank: int) -> tuple[int, ...]:
        """Blocks of each kind to keep so that at most `rank` columns stay, as many as the blocks allow."""
        step = int((self.columns <= rank).nonzero()[0]) if bool((self.columns <= rank).any()) else len(self.columns) - 1
        return tuple(int(count) for count in self.counts[step])

    def error_at(self, rank: int) -> float:
        """Relative squared error with at most `rank` columns kept."""
        step = int((self.columns <= rank).nonzero()[0]) if bool((self.columns <= rank).any()) else len(self.columns) - 1
        return float(self.errors[step])


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
    key_grams: (G, d, d).   blocks: one (n, b) tensor of column indices per kind (rotary pairs, free columns, …), which together
    name every column once.
    score: `paper` is sqrt(Σ ‖C_q^{1/2}[:, i]‖²‖C_k^{1/2}[:, i]‖²) over a block's columns and the group's heads; `energy` the exact
    ‖Q_b K_bᵀ‖² of a block; `greedy` drops one by one what adds least to the true error, cross terms included.
    scale: fits a coefficient per kept block and head by least squares on the logits; `complex` also turns pairs.
    Raises RankError for counts that the blocks cannot give, NumericalError for Gram matrices that are none.
    Source: MoDeGPT (arXiv 2408.09632), algorithm 2, for `paper`.
    """
    kinds = _Kinds.of(blocks, key_grams.shape[-1])
    if len(counts) != len(kinds.sizes):
        raise RankError(f"{len(counts)} counts for {len(kinds.sizes)} kinds of blocks")
    for size, available, count in zip(kinds.sizes, kinds.available, counts, strict=True):
        if not 0 <= count <= available:
            raise RankError(f"{count} blocks of {size} columns asked for where there are {available}")
    if not any(counts):
        raise RankError("no column would be kept")
    problem = _Problem.of(query_grams, key_grams, kinds, scale)
    present, _, _ = _descend(problem, kinds, list(counts), score)
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
    kinds = _Kinds.of(blocks, key_grams.shape[-1])
    problem = _Problem.of(query_grams, key_grams, kinds, scale)
    _, errors, counts = _descend(problem, kinds, [0] * len(kinds.sizes), score)
    table = torch.tensor(counts)
    return CrCurve(table, table @ torch.tensor(kinds.sizes), torch.tensor(errors, dtype=torch.float64))


@dataclass(frozen=True)
class _Kinds:
    """members: columns of every block, all kinds in one list.   kind: (n,) kind of every block."""

    members: list[Tensor]
    kind: Tensor
    sizes: list[int]
    available: list[int]

    @staticmethod
    def of(blocks: Sequence[Tensor], d: int) -> "_Kinds":
        named = torch.cat([kind.flatten() for kind in blocks]).sort().values
        if not torch.equal(named, torch.arange(d)):
            raise ValueError(f"the blocks do not name every one of {d} columns once")
        members = [row for kind in blocks for row in kind]
        kind = torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(blocks)])
        return _Kinds(members, kind, [rows.shape[1] for rows in blocks], [len(rows) for rows in blocks])


@dataclass(frozen=True)
class _Problem:
    """Error as a quadratic form of what every block loses.

    form: (G, h, n·p, n·p); h is 1 (heads summed) without coefficients, else g; p is 2 where pairs may turn, else 1: entry
    (i, j) is the product of what operators i and j add to the logits, real parts at 0, p, 2p, …
    column_energy: (G, n) squared score of the paper.   totals: (G,) ‖Q Kᵀ‖².
    """

    form: Tensor
    column_energy: Tensor
    totals: Tensor
    parts: int
    scaled: bool

    @staticmethod
    def of(query_grams: Tensor, key_grams: Tensor, kinds: _Kinds, scale: Scale) -> "_Problem":
        queries, keys = check_gram(query_grams, "query gram"), check_gram(key_grams, "key gram")
        if queries.ndim != 4 or keys.ndim != 3 or queries.shape[2:] != keys.shape[1:] or len(queries) != len(keys):
            raise ValueError(f"query grams {tuple(queries.shape)} do not fit key grams {tuple(keys.shape)}")
        summed = queries.sum(1)  # (G, d, d)
        hadamard = summed * keys
        d, n = keys.shape[-1], len(kinds.members)
        membership = torch.zeros(d, n, dtype=torch.float64)
        for block, columns in enumerate(kinds.members):
            membership[columns, block] = 1.0
        diagonal = hadamard.diagonal(dim1=1, dim2=2) @ membership
        totals = hadamard.sum(dim=(1, 2))
        if scale == "none":
            return _Problem((membership.mT @ hadamard @ membership)[:, None], diagonal, totals, 1, False)
        operators = torch.zeros(n, 1 if scale == "real" else 2, d, d, dtype=torch.float64)
        for block, columns in enumerate(kinds.members):
            operators[block, 0, columns, columns] = 1.0
            if scale == "complex" and len(columns) == 2:
                operators[block, 1] = _turn(columns, d)
        parts = operators.shape[1]
        form = _operator_form(queries, keys, kinds, operators)
        return _Problem(form, diagonal, totals, parts, True)

    def target(self) -> Tensor:
        """(n·p,) the coefficients that change nothing: 1 for every block, no turn."""
        target = torch.zeros(self.form.shape[-1], dtype=torch.float64)
        target[:: self.parts] = 1.0
        return target

    def parameters(self, present: Tensor) -> Tensor:
        """(G, n·p) which coefficients the blocks `present` (G, n) have."""
        return present.repeat_interleave(self.parts, dim=1)

    def residual(self, present: Tensor) -> Tensor:
        """(G, h, n·p): 1 minus the coefficient of every block, fitted where coefficients are free."""
        free = self.parameters(present)[:, None]  # (G, 1, n·p)
        lost = (~free).double() * self.target()
        lost = lost.expand(self.form.shape[:2] + lost.shape[-1:])
        if not self.scaled:
            return lost
        mask = (free[..., None, :] & free[..., :, None]).double()
        factor = factorise(self.form * mask, SCALE_RIDGE, "query/key form")
        pull = ((self.form @ lost[..., None]).squeeze(-1) * free)[..., None]
        return lost - torch.cholesky_solve(pull, factor.lower).squeeze(-1) * free

    def error(self, residual: Tensor) -> Tensor:
        """(G,) squared error of the logits."""
        return ((self.form @ residual[..., None]).squeeze(-1) * residual).sum(dim=(1, 2)).clamp_min(0)


def _turn(columns: Tensor, d: int) -> Tensor:
    """The quarter turn of a pair of columns, as a (d, d) operator on rows."""
    operator = torch.zeros(d, d, dtype=torch.float64)
    operator[columns[0], columns[1]], operator[columns[1], columns[0]] = -1.0, 1.0
    return operator


def _operator_form(queries: Tensor, keys: Tensor, kinds: _Kinds, operators: Tensor) -> Tensor:
    """(G, g, n·p, n·p) products ⟨Q E_i Kᵀ, Q E_j Kᵀ⟩ = tr(C_q E_i C_k E_jᵀ); E_i has one entry per row, of ±1."""
    n, parts, d, _ = operators.shape
    columns = torch.cat(kinds.members)
    block_of = torch.repeat_interleave(torch.arange(n), torch.tensor([len(rows) for rows in kinds.members]))
    form = torch.zeros(*queries.shape[:2], n, parts, n, parts, dtype=torch.float64)
    membership = torch.zeros(d, n, dtype=torch.float64)
    membership[columns, block_of] = 1.0
    for left in range(parts):
        moved_left = operators[:, left].sum(0)
        for right in range(parts):
            moved_right = operators[:, right].sum(0)
            # Operators of different blocks touch different rows, so one sum over them keeps every product apart.
            pairs = queries * (moved_left @ keys @ moved_right.mT)[:, None]
            form[:, :, :, left, :, right] = membership.mT @ pairs @ membership
    return form.reshape(*queries.shape[:2], n * parts, n * parts)


def _descend(
    problem: _Problem, kinds: _Kinds, floors: list[int], score: Score
) -> tuple[Tensor, list[float], list[list[int]]]:
    """Drop blocks until `floors` of each kind are left: who is still present (G, n), errors and counts after every step."""
    group_count, n = problem.column_energy.shape
    present = torch.ones(group_count, n, dtype=torch.bool)
    remaining = list(kinds.available)
    counts, errors = [list(remaining)], [0.0]
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
        present[torch.arange(group_count), chosen] = False
        remaining[kind] -= 1
        counts.append(list(remaining))
        errors.append(_share(problem.error(state.lost), problem.totals))
    return present, errors, counts


def _static_scores(problem: _Problem, score: Score) -> Tensor | None:
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

    problem: _Problem
    lost: Tensor
    inverse: Tensor | None

    @staticmethod
    def of(problem: _Problem) -> "_State":
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


def _query_factor(problem: _Problem, residual: Tensor, kinds: _Kinds, kept: Tensor) -> Tensor:
    """(G, g, k, k) the operators that the fitted coefficients stand for, on the kept columns."""
    group_count, heads = residual.shape[:2]
    d = sum(len(columns) for columns in kinds.members)
    coefficients = (problem.target() - residual).view(group_count, heads, -1, problem.parts)
    full = torch.zeros(group_count, heads, d, d, dtype=torch.float64)
    for block, columns in enumerate(kinds.members):
        full[:, :, columns, columns] = coefficients[:, :, block, :1].expand(-1, -1, len(columns))
        if problem.parts == 2 and len(columns) == 2:
            full = full + coefficients[:, :, block, 1, None, None] * _turn(columns, d)
    rows = full.gather(2, kept[:, None, :, None].expand(-1, heads, -1, d))
    return rows.gather(3, kept[:, None, None, :].expand(-1, heads, kept.shape[1], -1))


def _share(errors: Tensor, totals: Tensor) -> float:
    total = float(totals.sum())
    return float(errors.sum()) / total if total > 0 else 0.0
