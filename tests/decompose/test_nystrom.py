"""Claims about the MLP decomposition, each against explicit features Z."""

import pytest
import torch

from modegpt_graph.decompose.elimination import eliminate, eliminate_in_order
from modegpt_graph.decompose.numerics import NumericalError, RankError
from modegpt_graph.decompose.nystrom import leverage_scores, nystrom, selection_order, surgeon_order

N, D, TOKENS = 40, 12, 400


def features(seed: int = 0, count: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Z (TOKENS, N) with correlated columns of unequal size, W (N, D)."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(TOKENS, count // 4, dtype=torch.float64, generator=draw) @ torch.randn(
        count // 4, count, dtype=torch.float64, generator=draw
    )
    noise = torch.randn(TOKENS, count, dtype=torch.float64, generator=draw)
    size = torch.rand(count, dtype=torch.float64, generator=draw)
    return torch.relu(mixed + noise) * size, torch.randn(count, D, dtype=torch.float64, generator=draw)


def lost(z, w, result, bias=None):
    wanted = z @ w + (0 if bias is None else bias)
    given = z[:, result.kept] @ result.down + (0 if result.bias is None else result.bias)
    return float((wanted - given).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("selection", ["leverage", "surgeon", "energy", "magnitude"])
@pytest.mark.parametrize("rank", [1, 17, N - 1])
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_the_reported_error_is_the_error_on_the_features(selection, rank, ridge):
    z, w = features()
    result = nystrom(z.mT @ z, w, rank, ridge=ridge, selection=selection)
    assert result.kept.tolist() == sorted(set(result.kept.tolist()))
    assert result.down.shape == (rank, D)
    assert result.relative_error == pytest.approx(lost(z, w, result), rel=1e-8)


def test_a_bias_is_refitted_with_the_constant_kept():
    z, w = features()
    bias = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    augmented = torch.cat([z, torch.ones(TOKENS, 1, dtype=torch.float64)], 1)
    kept = torch.arange(0, N, 2)
    with_bias = nystrom(augmented.mT @ augmented, w, len(kept), ridge=0.0, bias=bias, kept=kept)
    assert with_bias.relative_error == pytest.approx(lost(z, w, with_bias, bias), rel=1e-8)
    design = augmented[:, [*kept.tolist(), N]]
    best = torch.linalg.lstsq(design, z @ w + bias).solution
    assert torch.allclose(torch.cat([with_bias.down, with_bias.bias[None]]), best, atol=1e-9)
    # A bias that stays as it is leaves the mean of the dropped features behind.
    alone = nystrom(augmented.mT @ augmented, w, len(kept), ridge=0.0, kept=kept)
    squared = with_bias.relative_error * (z @ w + bias).square().sum()
    assert squared < alone.relative_error * (z @ w).square().sum()


def test_without_ridge_the_refit_is_least_squares():
    z, w = features()
    kept = torch.arange(5, 25)
    result = nystrom(z.mT @ z, w, 20, ridge=0.0, kept=kept)
    assert torch.allclose(result.down, torch.linalg.lstsq(z[:, kept], z @ w).solution, atol=1e-9)


def test_full_rank_changes_nothing_whatever_the_ridge():
    z, w = features()
    result = nystrom(z.mT @ z, w, N, ridge=1.0)
    assert torch.equal(result.down, w)
    assert result.relative_error == 0.0


def test_leverage_scores_are_the_definition_and_fall_with_the_ridge():
    z, _ = features()
    gram = z.mT @ z
    penalty = 0.3 * gram.diagonal().mean()
    direct = (gram @ torch.linalg.inv(gram + penalty * torch.eye(N, dtype=torch.float64))).diagonal()
    assert torch.allclose(leverage_scores(gram, 0.3), direct, atol=1e-12)
    assert bool((leverage_scores(gram, 1.0) < leverage_scores(gram, 0.3)).all())
    order = selection_order(gram, torch.zeros(N, D), "leverage", ridge=0.0, leverage_ridge=0.3)
    assert torch.equal(order, direct.argsort())


def test_one_elimination_gives_the_error_of_every_rank():
    z, w = features()
    gram = z.mT @ z
    for ridge in (1e-9, 1e-2):
        order = surgeon_order(gram, w, ridge=ridge)
        for rank in (1, 2, 13, N - 1):
            result = nystrom(gram, w, rank, ridge=ridge, kept=order.kept(rank))
            assert float(order.errors[rank]) == pytest.approx(result.relative_error, rel=1e-6)
        assert float(order.errors[0]) == pytest.approx(1.0)
        assert float(order.errors[N]) == 0.0


def test_batched_downdates_agree_with_exact_refits_over_several_batches():
    z, w = features(count=120)
    gram = z.mT @ z
    order = eliminate(gram, w, ridge=1e-6, batch=16)
    assert sorted(order.order.tolist()) == list(range(120))
    for rank in (5, 60, 100):
        result = nystrom(gram, w, rank, ridge=1e-6, kept=order.kept(rank))
        assert float(order.errors[rank]) == pytest.approx(result.relative_error, rel=1e-6)


@pytest.mark.parametrize("ridge", [1e-9, 1e-2, 1.0])
def test_the_errors_of_a_given_order_are_those_of_exact_refits(ridge: float):
    z, w = features(count=120)
    gram = z.mT @ z
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    found = eliminate_in_order(gram, w, order, ridge=ridge)
    for rank in (1, 5, 60, 119):
        result = nystrom(gram, w, rank, ridge=ridge, kept=order[120 - rank :])
        assert float(found.errors[rank]) == pytest.approx(result.relative_error, rel=1e-6)
    assert float(found.errors[0]) == pytest.approx(1.0)
    assert float(found.errors[120]) == 0.0


def test_each_step_of_the_surgeon_drops_what_costs_least_after_the_refit():
    z, w = features(count=12)
    gram = z.mT @ z
    order = surgeon_order(gram, w, ridge=0.0).order.tolist()
    alive = list(range(12))
    for dropped in order[:-1]:
        errors = {
            candidate: nystrom(
                gram, w, len(alive) - 1, ridge=0.0, kept=torch.tensor([c for c in alive if c != candidate])
            ).relative_error
            for candidate in alive
        }
        assert errors[dropped] == pytest.approx(min(errors.values()), rel=1e-9)
        alive.remove(dropped)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [8, 20, 30])
def test_the_surgeon_is_never_worse_than_the_scores_on_correlated_features(seed, rank):
    z, w = features(seed)
    gram = z.mT @ z
    errors = {
        selection: nystrom(gram, w, rank, ridge=1e-6, selection=selection).relative_error
        for selection in ("surgeon", "leverage", "energy", "magnitude")
    }
    assert errors["surgeon"] <= min(errors.values())


def test_the_surgeon_sees_twins_that_magnitude_does_not():
    """Two equal columns: one can be dropped for nothing, however large both are."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(TOKENS, 6, dtype=torch.float64, generator=draw)
    z[:, 1] = z[:, 0] * 10
    z[:, 0] = z[:, 1]
    w = torch.ones(6, 2, dtype=torch.float64)
    result = nystrom(z.mT @ z, w, 5, ridge=1e-9, selection="surgeon")
    assert {0, 1} - set(result.kept.tolist())
    assert result.relative_error < 1e-9
    assert nystrom(z.mT @ z, w, 5, ridge=1e-9, selection="energy").relative_error > 1e-4


@pytest.mark.parametrize("selection", ["leverage", "surgeon", "energy", "magnitude"])
def test_blocks_stay_or_go_together(selection):
    z, w = features()
    blocks = torch.randperm(N, generator=torch.Generator().manual_seed(1)).view(-1, 4)
    result = nystrom(z.mT @ z, w, 12, ridge=1e-4, selection=selection, blocks=blocks)
    kept = set(result.kept.tolist())
    assert len(kept) == 12
    assert all(set(block) <= kept or not set(block) & kept for block in blocks.tolist())
    assert result.relative_error == pytest.approx(lost(z, w, result), rel=1e-8)


def test_the_curve_over_blocks_is_exact_too():
    z, w = features()
    blocks = torch.arange(N).view(4, -1).mT
    order = surgeon_order(z.mT @ z, w, ridge=1e-4, blocks=blocks)
    for count in (1, 4, 9):
        kept = blocks[order.kept(count)].flatten()
        result = nystrom(z.mT @ z, w, 4 * count, ridge=1e-4, blocks=blocks, kept=kept)
        assert float(order.errors[count]) == pytest.approx(result.relative_error, rel=1e-6)


def test_a_feature_that_never_fires_costs_nothing_and_a_dead_expert_is_no_error():
    z, w = features()
    z[:, 7] = 0
    result = nystrom(z.mT @ z, w, N - 1, ridge=0.0, selection="surgeon")
    assert 7 not in result.kept.tolist()
    assert result.relative_error < 1e-12
    dead = nystrom(torch.zeros(N, N, dtype=torch.float64), w, 10, ridge=1e-3, selection="surgeon")
    assert dead.relative_error == 0.0
    assert torch.equal(dead.down, w[dead.kept])


def test_a_singular_gram_matrix_is_solved_and_the_ridge_reported():
    z, w = features()
    few = z[:10]  # rank 10 of 40
    result = nystrom(few.mT @ few, w, 20, ridge=0.0)
    assert 0 < result.ridge < 1e-6
    assert bool(torch.isfinite(result.down).all())
    assert result.relative_error < 1e-9  # 20 columns span all that 10 tokens hold


def test_bad_input_is_named():
    z, w = features()
    gram = z.mT @ z
    with pytest.raises(RankError, match=r"rank 0 is not in 1\.\.40"):
        nystrom(gram, w, 0, ridge=0.0)
    with pytest.raises(RankError, match="splits blocks of 4"):
        nystrom(gram, w, 10, ridge=0.0, blocks=torch.arange(N).view(-1, 4))
    with pytest.raises(RankError, match="2 different columns where rank is 3"):
        nystrom(gram, w, 3, ridge=0.0, kept=torch.tensor([1, 2, 2]))
    gram[3, 3] = torch.inf
    with pytest.raises(NumericalError, match="1 non-finite"):
        nystrom(gram, w, 3, ridge=0.0)
