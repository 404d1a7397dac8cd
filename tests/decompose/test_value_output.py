"""Claims about value/output pairs, each against explicit attention outputs."""

import itertools

import pytest
import torch

from modegpt_graph.decompose.numerics import NumericalError, RankError
from modegpt_graph.decompose.value_output import paper_value_output, value_output_svd

G, HEADS, SIZE, TOKENS, WIDTH = 2, 3, 8, 60, 20


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head_outputs(seed=0):
    """O (G, HEADS, TOKENS, SIZE), whose heads differ as their position mixing does; W (G, HEADS, SIZE, WIDTH)."""
    size = torch.rand(1, HEADS, 1, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (rand(G, 1, TOKENS, SIZE, seed=seed) + rand(G, HEADS, TOKENS, SIZE, seed=seed + 1)) * size, rand(
        G, HEADS, SIZE, WIDTH, seed=seed + 2
    )


def lost(o, w, basis, output):
    return float((o @ w - o @ basis[:, None] @ output).square().sum() / (o @ w).square().sum())


@pytest.mark.parametrize("rank", range(1, SIZE + 1))
@pytest.mark.parametrize("sweeps", [0, 2])
def test_the_reported_error_is_the_error_of_the_outputs(rank, sweeps):
    o, w = head_outputs()
    result = value_output_svd(o.mT @ o, w, rank, sweeps=sweeps)
    assert result.relative_error == pytest.approx(lost(o, w, result.basis, result.output), rel=1e-8, abs=1e-14)
    assert torch.allclose(result.basis.mT @ result.basis, torch.eye(rank, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("equal", [True, False])
def test_the_curve_holds_the_error_of_every_rank(equal):
    o, w = head_outputs()
    if equal:
        o = o[:, :1].expand(-1, HEADS, -1, -1)
    curve = value_output_svd(o.mT @ o, w, 4).errors
    for rank in range(1, SIZE + 1):
        result = value_output_svd(o.mT @ o, w, rank, sweeps=0)
        if equal:
            assert float(curve[rank]) == pytest.approx(result.relative_error, rel=1e-6, abs=1e-14)
        else:  # which closed form is better may change with the rank
            assert float(result.errors[rank]) == pytest.approx(result.relative_error, rel=1e-6, abs=1e-14)
    assert float(curve[0]) == pytest.approx(1.0)


def test_equal_head_grams_give_the_truncated_stack():
    o, w = head_outputs()
    o = o[:, :1].expand(-1, HEADS, -1, -1)
    stack = torch.linalg.svdvals(o[:, 0] @ w.permute(0, 2, 1, 3).flatten(2))  # (G, SIZE)
    for rank in (1, 3, 6):
        best = float(stack[:, rank:].square().sum() / stack.square().sum())
        # The ridge of 1e-8 that keeps the inverse root bounded acts to second order.
        for sweeps in (0, 3):
            error = value_output_svd(o.mT @ o, w, rank, sweeps=sweeps).relative_error
            assert error == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_basis_is_better_where_the_head_grams_are_equal(seed):
    o, w = head_outputs(seed)
    o = o[:, :1].expand(-1, HEADS, -1, -1)
    best = value_output_svd(o.mT @ o, w, 3)
    for trial in range(20):
        for size in (1e-3, 1e-1, 1.0):
            basis = best.basis + size * rand(G, SIZE, 3, seed=50 + trial)
            output = torch.linalg.lstsq(o @ basis[:, None], o @ w).solution
            assert lost(o, w, basis, output) >= best.relative_error * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_better_of_two_closed_forms_is_taken_group_by_group(seed):
    o, w = head_outputs(seed)
    grams = o.mT @ o
    values, vectors = torch.linalg.eigh(grams.mean(1))
    root = (vectors * values.sqrt()[:, None]) @ vectors.mT
    inverse = (vectors * values.rsqrt()[:, None]) @ vectors.mT
    outer = w @ w.mT
    of_mean = inverse @ torch.linalg.eigh(root @ outer.sum(1) @ root).eigenvectors[..., -3:]
    of_all = inverse @ torch.linalg.eigh(inverse @ (grams @ outer @ grams).sum(1) @ inverse).eigenvectors[..., -3:]

    def left(basis):
        fitted = torch.linalg.lstsq(o @ basis[:, None], o @ w).solution
        return (o @ w - o @ basis[:, None] @ fitted).square().sum(dim=(1, 2, 3))

    best = float(torch.minimum(left(of_mean), left(of_all)).sum() / (o @ w).square().sum())
    assert value_output_svd(grams, w, 3, sweeps=0).relative_error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_sweeps_only_help_where_heads_differ(seed):
    o, w = head_outputs(seed)
    grams = o.mT @ o
    errors = [value_output_svd(grams, w, 3, sweeps=sweeps).relative_error for sweeps in (0, 1, 3, 10)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.999 * errors[0]


def test_the_paper_is_the_truncation_of_the_product():
    x, value = rand(TOKENS, 12), rand(G, 12, SIZE, seed=1)
    single = rand(G, 1, SIZE, WIDTH, seed=2)
    result = paper_value_output(x.mT @ x, value, single, 3)
    product = x @ value @ single[:, 0]
    singular = torch.linalg.svdvals(product)
    given = x @ result.value @ result.output[:, 0]
    error = float((product - given).square().sum() / product.square().sum())
    assert result.relative_error == pytest.approx(error, rel=1e-8)
    assert error == pytest.approx(float(singular[:, 3:].square().sum() / singular.square().sum()), rel=1e-8)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("rank", [1, 4, SIZE])
def test_the_papers_error_is_the_error_on_the_inputs(stacked, rank):
    x, value, output = rand(TOKENS, 12), rand(G, 12, SIZE, seed=1), rand(G, HEADS, SIZE, WIDTH, seed=2)
    result = paper_value_output(x.mT @ x, value, output, rank, stacked=stacked)
    wanted = (x @ value)[:, None] @ output
    given = (x @ result.value)[:, None] @ result.output
    error = float((wanted - given).square().sum() / wanted.square().sum())
    assert result.relative_error == pytest.approx(error, rel=1e-8, abs=1e-14)
    assert float(result.errors[rank]) == pytest.approx(error, rel=1e-8, abs=1e-14)


def test_the_stacked_second_svd_beats_the_papers_grouped_variant():
    x, value, output = rand(TOKENS, 12), rand(G, 12, SIZE, seed=1), rand(G, HEADS, SIZE, WIDTH, seed=2)
    output = output * torch.logspace(-1, 1, SIZE, dtype=torch.float64)[:, None]  # output rows of unequal size
    for rank in range(1, SIZE):
        stacked, plain = (
            paper_value_output(x.mT @ x, value, output, rank, stacked=flag).relative_error for flag in (True, False)
        )
        assert stacked < 0.9 * plain


def test_few_tokens_dead_groups_and_full_rank_hold():
    o, w = head_outputs()
    few = o[:, :, :3]
    full = value_output_svd(few.mT @ few, w, SIZE)
    assert lost(o, w, full.basis, full.output) < 1e-9 or full.relative_error < 1e-12
    dead = value_output_svd(torch.zeros(G, HEADS, SIZE, SIZE, dtype=torch.float64), w, 3, sweeps=2)
    assert dead.relative_error == 0.0
    assert bool(torch.isfinite(dead.basis).all() & torch.isfinite(dead.output).all())


def test_bad_input_is_named():
    o, w = head_outputs()
    with pytest.raises(RankError, match=r"rank 0 is not in 1\.\.8"):
        value_output_svd(o.mT @ o, w, 0)
    w[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="output weight has 1 non-finite"):
        value_output_svd(o.mT @ o, w, 3)
