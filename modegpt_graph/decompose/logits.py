"""What attention logits lose when query/key columns are dropped or weighed, as a quadratic form.

Every figure here comes from one identity. With H = C_q ∘ C_k (Hadamard product; C_q summed over the heads of a group)
the logits of all query/key pairs lose ‖Q D Kᵀ‖² = Σ_ij d_i H_ij d_j when column i is weighed by 1 − d_i: d is 1 on
dropped columns, 0 on kept ones, or a fitted coefficient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modegpt_graph.decompose.numerics import check_gram, factorise

Scale = Literal["none", "real", "complex"]
SCALE_RIDGE = 1e-6


@dataclass(frozen=True)
class Kinds:
    """members: columns of every block, all kinds in one list.   kind: (n,) kind of every block."""

    members: list[Tensor]
    kind: Tensor
    sizes: list[int]
    available: list[int]

    @staticmethod
    def of(blocks: Sequence[Tensor], d: int) -> "Kinds":
        """Number the blocks of all kinds; ValueError where they do not name each of `d` columns once."""
        named = torch.cat([kind.flatten() for kind in blocks]).sort().values
        if not torch.equal(named, torch.arange(d)):
            raise ValueError(f"the blocks do not name every one of {d} columns once")
        members = [row for kind in blocks for row in kind]
        kind = torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(blocks)])
        return Kinds(members, kind, [rows.shape[1] for rows in blocks], [len(rows) for rows in blocks])


@dataclass(frozen=True)
class LogitsForm:
    """Error as a quadratic form of what every block loses.

    form: (G, h, n·p, n·p); h is 1 (heads summed) without coefficients, else g; p is 2 where pairs may turn, else 1:
    entry (i, j) is the product of what operators i and j add to the logits, real parts at 0, p, 2p, …
    column_energy: (G, n) squared score of the paper.   totals: (G,) ‖Q Kᵀ‖².
    """

    form: Tensor
    column_energy: Tensor
    totals: Tensor
    parts: int
    scaled: bool

    @staticmethod
    def of(query_grams: Tensor, key_grams: Tensor, kinds: Kinds, scale: Scale) -> "LogitsForm":
        """Check the Gram matrices and sum them over blocks, or over what the coefficients of a block can do."""
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
            return LogitsForm((membership.mT @ hadamard @ membership)[:, None], diagonal, totals, 1, False)
        operators = torch.zeros(n, 1 if scale == "real" else 2, d, d, dtype=torch.float64)
        for block, columns in enumerate(kinds.members):
            operators[block, 0, columns, columns] = 1.0
            if scale == "complex" and len(columns) == 2:
                operators[block, 1] = quarter_turn(columns, d)
        parts = operators.shape[1]
        form = _operator_form(queries, keys, kinds, operators)
        return LogitsForm(form, diagonal, totals, parts, True)

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


def quarter_turn(columns: Tensor, d: int) -> Tensor:
    """The quarter turn of a pair of columns, as a (d, d) operator on rows."""
    operator = torch.zeros(d, d, dtype=torch.float64)
    operator[columns[0], columns[1]], operator[columns[1], columns[0]] = -1.0, 1.0
    return operator


def _operator_form(queries: Tensor, keys: Tensor, kinds: Kinds, operators: Tensor) -> Tensor:
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
