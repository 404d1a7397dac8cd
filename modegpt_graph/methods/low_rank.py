"""Every matrix replaced by two thin ones: the truncated SVDs, which differ in the metric that they are taken in.

With x ↦ W x and a metric S on the inputs, W S = U Σ Vᵀ and truncation give U_k Σ_k V_kᵀ S⁻¹ = U_k (U_kᵀ W): whatever S
is, nothing has to be inverted. Both factors count as parameters; every matrix loses the same share.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from modegpt_graph.allocate.budget import Item, Target, ranks_for_ratios
from modegpt_graph.decompose.numerics import factorise
from modegpt_graph.errors import InputError
from modegpt_graph.methods.common import Pass, Setting, Smaller, check_runs
from modegpt_graph.methods.inputs import Place, Values, observe
from modegpt_graph.methods.matrices import MatrixModule, linear_of, matrix_modules

ABSOLUTE_POWER = 0.5  # ASVD's α, its recommended value

Metric = Callable[[Tensor, Values], Tensor]
"""(out, in) matrix and what it reads → the matrix in the metric, (out, in)."""


def svd(setting: Setting) -> Pass:
    """Truncated SVD: the nearest matrix of that rank in the Frobenius norm, whatever is put in.

    Source: Denton et al. (arXiv 1404.0736); Eckart and Young (1936).
    """
    return _low_rank(setting, None)


def asvd(setting: Setting) -> Pass:
    """SVD of W·diag(mean |x|^α), which spares the inputs that are large.

    Source: ASVD (arXiv 2312.05821), equations 5 to 7 with α = 0.5; one share for every matrix, without its search for
    the sensitivity of each.
    """
    return _low_rank(setting, scaled)


def svd_llm(setting: Setting) -> Pass:
    """SVD of W·L with L Lᵀ = Xᵀ X: the least error of the output on the calibration text.

    Source: SVD-LLM (arXiv 2403.07378), section 3.1, truncation-aware whitening; without fine-tuning afterwards.
    """
    return _low_rank(setting, whitened)


def scaled(matrix: Tensor, read: Values) -> Tensor:
    """W·diag(mean |x|^α)."""
    return matrix * read.absolute.clamp_min(1e-12).pow(ABSOLUTE_POWER)


def whitened(matrix: Tensor, read: Values) -> Tensor:
    """W·L; its singular values beyond a rank are the error of the output, ‖X (W − W_k)ᵀ‖²_F = Σ σ_i²."""
    return matrix @ factorise(read.gram[:-1, :-1], 0.0).lower


def _low_rank(setting: Setting, metric: Metric | None) -> Pass:
    matrices = matrix_modules(setting)
    sources = {one.source: Place(one.path) for one in matrices}
    read = {} if metric is None else observe(setting, sources, "observe what matrices read")
    bases = {}
    with setting.progress.stage("decompose", len(matrices)) as stage:
        for one in matrices:
            matrix = one.matrix(setting.dense).double()
            if metric is not None and one.source in read:
                matrix = metric(matrix, read[one.source])
            left = torch.linalg.svd(matrix, full_matrices=False).U
            bases[one.weight] = left.float()
            stage.advance()

    def at(ratio: float) -> Smaller:
        shapes = {one.weight: tuple(one.matrix(setting.dense).shape) for one in matrices}
        ranks = _ranks(matrices, shapes, setting.total, ratio)
        smaller, removed = copy.deepcopy(setting.dense), 0
        for one in matrices:
            rank, (rows, columns) = ranks[one.weight], shapes[one.weight]
            if rank * (rows + columns) < rows * columns:
                basis = bases[one.weight][:, :rank].double()
                replace(smaller, one, basis, basis.T @ one.matrix(setting.dense).double())
                removed += rows * columns - rank * (rows + columns)
        check_runs(smaller, setting)
        return Smaller(smaller, removed)

    return at


def replace(model: nn.Module, one: MatrixModule, second: Tensor, first: Tensor) -> None:
    """Put x ↦ second (first x) + b in the place of a matrix. second: (out, k).   first: (k, in)."""
    weight, bias = one.matrix(model), one.offset(model)
    parent, _, name = one.path.rpartition(".")
    pair = nn.Sequential(linear_of(first.to(weight.dtype), None), linear_of(second.to(weight.dtype), bias))
    setattr(model.get_submodule(parent), name, pair.train(model.training))


def _ranks(
    matrices: Sequence[MatrixModule], shapes: dict[str, tuple[int, ...]], total: int, ratio: float
) -> dict[str, int]:
    """Ranks at which the two factors have the same share of each matrix's parameters.

    At the highest rank of an item the factors are no larger than the matrix; what that saves already is no rank's.
    """
    items, saved = [], 0
    for one in matrices:
        rows, columns = shapes[one.weight]
        highest = rows * columns // (rows + columns)
        saved += rows * columns - highest * (rows + columns)
        items.append(Item(one.weight, one.layer, highest, rows + columns))
    layers: dict[int | None, float] = {one.layer: 1.0 for one in matrices}
    wished = ratio * total - saved
    if wished <= 0:
        return {item.id: item.full_rank for item in items}
    try:
        return ranks_for_ratios(items, layers, Target(total, wished / total))
    except InputError:
        most = saved + sum(item.removed(item.lowest()) for item in items)
        raise InputError(f"ratio {ratio:g} cannot be met: factors of rank 1 give {most / total:.4f}") from None
