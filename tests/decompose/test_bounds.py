"""Every bound holds on what the decompositions really lose, and is not vacuous."""

import pytest
import torch

from modegpt_graph.decompose.bounds import (
    cr_bound,
    cr_residual,
    nystrom_bound,
    nystrom_trace_bound,
    svd_bound,
    svd_product_bound,
)
from modegpt_graph.decompose.cr import cr
from modegpt_graph.decompose.nystrom import nystrom
from modegpt_graph.decompose.svd import query_key_svd
from modegpt_graph.decompose.value_output import paper_value_output

SEEDS = range(4)


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("selection", ["leverage", "surgeon", "magnitude"])
def test_proposition_1(seed, selection):
    z, w = rand(80, 12, seed=seed) @ rand(12, 12, seed=seed + 1), rand(12, 5, seed=seed + 2)
    gram = z.mT @ z
    for rank in (1, 4, 8, 11):
        result = nystrom(gram, w, rank, ridge=0.0, selection=selection)
        lost = result.relative_error * float((z @ w).square().sum())
        loose, tight = nystrom_bound(gram, w, result.kept), nystrom_trace_bound(gram, w, result.kept)
        assert 0 < lost <= tight * (1 + 1e-9)
        assert tight <= loose * (1 + 1e-9)
        assert tight < 1000 * lost


def test_proposition_1_is_tight_for_one_dropped_column_and_one_output_direction():
    z = rand(80, 6)
    gram, kept = z.mT @ z, torch.arange(5)
    w = torch.zeros(6, 1, dtype=torch.float64)
    w[5] = 2.0
    result = nystrom(gram, w, 5, ridge=0.0, kept=kept)
    lost = result.relative_error * float((z @ w).square().sum())
    assert nystrom_trace_bound(gram, w, kept) == pytest.approx(lost, rel=1e-9)


def test_proposition_1_says_nothing_about_a_singular_gram_matrix_but_the_trace_does():
    z = rand(5, 12)
    kept = torch.arange(4)
    assert nystrom_bound(z.mT @ z, rand(12, 5), kept) == float("inf")
    assert nystrom_trace_bound(z.mT @ z, rand(12, 5), kept) < float("inf")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("block_size", "heads"), [(1, 1), (2, 1), (2, 3), (4, 2)])
def test_proposition_2(seed, block_size, heads):
    d = 12
    mix = rand(d, d, seed=seed)
    q, k = rand(heads, 60, d, seed=seed + 1) @ mix, rand(60, d, seed=seed + 2) @ mix
    cq, ck = q.mT @ q, k.mT @ k
    blocks = torch.arange(d).view(block_size, -1).mT
    for count in range(1, d // block_size):
        result = cr(cq[None], ck[None], [blocks], [count])
        lost = result.relative_error * float((q @ k.mT).square().sum())
        assert 0 < lost <= cr_bound(cq, ck, count * block_size, block_size=block_size)
        assert cr_residual(cq.sum(0), ck, result.kept[0]) == pytest.approx(lost, rel=1e-9)


def test_proposition_2_is_reached_by_equal_columns():
    q = torch.ones(7, 1, dtype=torch.float64).expand(7, 4)
    gram = q.mT @ q
    result = cr(gram[None, None], gram[None], [torch.arange(4)[:, None]], [1])
    assert cr_bound(gram, gram, 1) == pytest.approx(result.relative_error * float((q @ q.mT).square().sum()), rel=1e-9)


def test_proposition_2_needs_its_factor_for_blocks():
    """A dropped pair whose columns agree loses twice what its score says."""
    norms = torch.tensor([1.0, 1.0, 2**0.5 * 1.001, 0.0], dtype=torch.float64).sqrt()
    gram = torch.outer(norms, norms)
    result = cr(gram[None, None], gram[None], [torch.tensor([[0, 1], [2, 3]])], [1])
    lost = result.relative_error * float((gram * gram).sum())
    assert cr_bound(gram, gram, 2) < lost <= cr_bound(gram, gram, 2, block_size=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_proposition_3(seed):
    x, value, output = rand(60, 10, seed=seed), rand(1, 10, 6, seed=seed + 1), rand(1, 2, 6, 9, seed=seed + 2)
    gram = x.mT @ x
    whole = float(((x @ value)[:, None] @ output).square().sum())
    stack = output[0].permute(1, 0, 2).flatten(1)
    spectrum = torch.linalg.svdvals(x @ value[0] @ stack)
    for rank in range(1, 6):
        lost = paper_value_output(gram, value, output, rank).relative_error * whole
        assert 0 < lost <= svd_bound(spectrum[:6], rank)
        assert lost <= svd_product_bound(gram, value[0], stack, rank)
        q, k = rand(1, 1, 50, 6, seed=seed), rand(1, 50, 6, seed=seed + 1)
        pair = query_key_svd(q.mT @ q, k.mT @ k, rank)
        assert pair.relative_error * float((q[0, 0] @ k[0].mT).square().sum()) <= svd_bound(pair.spectrum[0], rank)
