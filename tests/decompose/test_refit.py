import pytest
import torch

from modegpt_graph.decompose.nystrom import nystrom
from modegpt_graph.decompose.refit import refit
from modegpt_graph.decompose.value_output import value_output_svd

HEADS, SIZE, RANK, TOKENS, WIDTH = 4, 6, 3, 80, 10
N = HEADS * SIZE


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(seed=0):
    """X (TOKENS, N) whose heads are correlated with each other; W (N, WIDTH)."""
    return rand(TOKENS, 10, seed=seed) @ rand(10, N, seed=seed + 1) + 0.5 * rand(TOKENS, N, seed=seed + 2) + 0.3, rand(
        N, WIDTH, seed=seed + 3
    )


def blocks():
    return torch.linalg.qr(rand(HEADS, SIZE, RANK, seed=9)).Q


def augmented(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0])
def test_the_reported_error_is_the_error_on_the_inputs(ridge):
    x, w = inputs()
    dense = torch.block_diag(*blocks())
    for basis in (blocks(), dense, torch.arange(0, N, 2)):
        result = refit(x.mT @ x, basis, w, ridge=ridge)
        reduced = x[:, basis] if basis.ndim == 1 else x @ dense
        error = float((x @ w - reduced @ result.weight).square().sum() / (x @ w).square().sum())
        assert result.relative_error == pytest.approx(error, rel=1e-8)


def test_without_ridge_it_is_least_squares_with_and_without_bias():
    x, w = inputs()
    bias = rand(WIDTH, seed=7)
    reduced = x @ torch.block_diag(*blocks())
    plain = refit(x.mT @ x, blocks(), w, ridge=0.0)
    assert torch.allclose(plain.weight, torch.linalg.lstsq(reduced, x @ w).solution, atol=1e-9)
    assert plain.bias is None
    full = augmented(x)
    with_bias = refit(full.mT @ full, blocks(), w, ridge=0.0, bias=bias)
    best = torch.linalg.lstsq(augmented(reduced), x @ w + bias).solution
    assert with_bias.bias is not None
    assert torch.allclose(torch.cat([with_bias.weight, with_bias.bias[None]]), best, atol=1e-9)
    wanted = x @ w + bias
    error = float((wanted - reduced @ with_bias.weight - with_bias.bias).square().sum() / wanted.square().sum())
    assert with_bias.relative_error == pytest.approx(error, rel=1e-8)


def test_blocks_a_dense_basis_and_columns_agree():
    x, w = inputs()
    gram = x.mT @ x
    one, other = refit(gram, blocks(), w, ridge=1e-2), refit(gram, torch.block_diag(*blocks()), w, ridge=1e-2)
    assert torch.allclose(one.weight, other.weight, atol=1e-10)
    kept = torch.arange(1, N, 3)
    by_columns, by_nystrom = refit(gram, kept, w, ridge=1e-2), nystrom(gram, w, len(kept), ridge=1e-2, kept=kept)
    assert torch.allclose(by_columns.weight, by_nystrom.down, atol=1e-10)
    assert by_columns.relative_error == pytest.approx(by_nystrom.relative_error, rel=1e-9)


def test_full_rank_gives_the_original_back_at_every_ridge():
    x, w = inputs()
    basis = rand(HEADS, SIZE, SIZE, seed=4)
    result = refit(x.mT @ x, basis, w, ridge=1.0)
    assert torch.allclose(torch.block_diag(*basis) @ result.weight, w, atol=1e-9)
    assert result.relative_error < 1e-18


def test_the_ridge_acts_on_features_whatever_the_coordinates_of_the_basis():
    x, w = inputs()
    turn = rand(HEADS, RANK, RANK, seed=5)
    one, other = (refit(x.mT @ x, basis, w, ridge=0.1) for basis in (blocks(), blocks() @ turn))
    assert torch.allclose(
        torch.block_diag(*blocks()) @ one.weight, torch.block_diag(*(blocks() @ turn)) @ other.weight, atol=1e-9
    )


def test_a_huge_ridge_stays_at_the_prior():
    x, w = inputs()
    prior = rand(HEADS * RANK, WIDTH, seed=6)
    result = refit(x.mT @ x, blocks(), w, ridge=1e12, prior=prior)
    assert torch.allclose(result.weight, prior, atol=1e-9)


def test_the_refit_over_all_heads_beats_the_refit_head_by_head():
    x, w = inputs()
    heads = x.view(TOKENS, HEADS, SIZE).permute(1, 0, 2)[:, None]  # (HEADS groups, 1, TOKENS, SIZE)
    single = value_output_svd(heads.mT @ heads, w.view(HEADS, 1, SIZE, WIDTH), RANK)
    one_shot = x @ torch.block_diag(*single.basis) @ single.output.reshape(-1, WIDTH)
    before = float((x @ w - one_shot).square().sum() / (x @ w).square().sum())
    assert refit(x.mT @ x, single.basis, w, ridge=0.0).relative_error < 0.9 * before


def test_a_drifted_input_is_fitted_to_the_original_output():
    x, w = inputs()
    drifted, bias = x + 0.2 * rand(TOKENS, N, seed=8), rand(WIDTH, seed=7)
    now, then = augmented(drifted), augmented(x)
    result = refit(now.mT @ now, blocks(), w, ridge=0.0, bias=bias, cross=now.mT @ then, target=then.mT @ then)
    reduced = drifted @ torch.block_diag(*blocks())
    best = torch.linalg.lstsq(augmented(reduced), x @ w + bias).solution
    assert result.bias is not None
    assert torch.allclose(torch.cat([result.weight, result.bias[None]]), best, atol=1e-8)
    wanted = x @ w + bias
    error = float((wanted - reduced @ result.weight - result.bias).square().sum() / wanted.square().sum())
    assert result.relative_error == pytest.approx(error, rel=1e-8)


def test_a_basis_that_fits_nothing_is_named():
    x, w = inputs()
    with pytest.raises(ValueError, match=r"basis \(5, 2\) is neither"):
        refit(x.mT @ x, torch.zeros(5, 2), w, ridge=0.0)
    with pytest.raises(ValueError, match="Gram matrix of"):
        refit(x.mT @ x, blocks(), w, ridge=0.0, bias=torch.zeros(WIDTH))
