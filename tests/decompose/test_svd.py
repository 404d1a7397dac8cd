"""Claims about pairs with nothing nonlinear between, each against explicit queries and keys or inputs."""

import pytest
import torch

from modegpt_graph.decompose.cr import cr
from modegpt_graph.decompose.numerics import NumericalError, RankError
from modegpt_graph.decompose.svd import linear_pair, query_key_svd

G, HEADS, SIZE, TOKENS = 2, 3, 8, 50


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draws(seed=0):
    mix = rand(G, SIZE, SIZE, seed=seed)
    return rand(G, HEADS, TOKENS, SIZE, seed=seed + 1) @ mix[:, None], rand(G, TOKENS, SIZE, seed=seed + 2) @ mix


def lost(q, k, query_map, key_map):
    wanted = q @ k[:, None].mT
    given = (q @ query_map[:, None]) @ (k @ key_map)[:, None].mT
    return float((wanted - given).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("rank", range(1, SIZE + 1))
def test_query_key_error_is_the_error_of_the_logits_and_on_the_curve(rank):
    q, k = draws()
    result = query_key_svd(q.mT @ q, k.mT @ k, rank)
    assert result.query_map.shape == result.key_map.shape == (G, SIZE, rank)
    # 1e-12 is rounding of the total, for the ranks at which next to nothing is lost.
    assert result.relative_error == pytest.approx(lost(q, k, result.query_map, result.key_map), rel=1e-8, abs=1e-12)
    assert float(result.errors[rank]) == pytest.approx(result.relative_error, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_pair_of_that_rank_is_better(seed):
    q, k = draws(seed)
    cq, ck = q.mT @ q, k.mT @ k
    best = query_key_svd(cq, ck, 3)
    for trial in range(20):
        for size in (1e-3, 1e-1, 1.0):
            query_map = best.query_map + size * rand(G, SIZE, 3, seed=100 + trial)
            # Given query_map the best key_map solves least squares, which is harder to beat than a random one.
            metric = query_map.mT @ cq.sum(1) @ query_map
            key_map = torch.linalg.solve(metric, query_map.mT @ cq.sum(1)).mT
            assert lost(q, k, query_map, key_map) >= best.relative_error * (1 - 1e-9)
    columns = cr(cq, ck, [torch.arange(SIZE)[:, None]], [3], score="greedy")
    assert best.relative_error < columns.relative_error


def test_full_rank_is_lossless_on_unseen_text_even_from_few_tokens():
    q, k = draws()
    few_q, few_k = q[:, :, :3], k[:, :3]
    result = query_key_svd(few_q.mT @ few_q, few_k.mT @ few_k, SIZE)
    # Unseen directions weigh 1e-8 in the metric, so of the 16 digits about 8 are left there, squared here.
    assert lost(q, k, result.query_map, result.key_map) < 1e-12


def test_a_deficient_gram_matrix_needs_only_its_rank():
    q, k = draws()
    q = q @ torch.diag((torch.arange(SIZE) < 4).double())
    result = query_key_svd(q.mT @ q, k.mT @ k, 4)
    assert result.relative_error < 1e-12
    assert bool(torch.isfinite(result.query_map).all() & torch.isfinite(result.key_map).all())


def test_dead_heads_lose_nothing():
    zero = torch.zeros(G, SIZE, SIZE, dtype=torch.float64)
    result = query_key_svd(zero[:, None], zero, 2)
    assert result.relative_error == 0.0
    assert bool(torch.isfinite(result.query_map).all())


@pytest.mark.parametrize(("features", "outputs"), [(10, 6), (6, 10), (20, 6)])
def test_a_linear_pair_is_truncated_at_its_output(features, outputs):
    x, first, second = rand(60, 8), rand(8, features, seed=1), rand(features, outputs, seed=2)
    wanted = x @ first @ second
    singular = torch.linalg.svdvals(wanted)
    for rank in range(1, features + 1):
        result = linear_pair(x.mT @ x, first, second, rank)
        assert result.first.shape == (8, rank)
        assert result.second.shape == (rank, outputs)
        error = float((wanted - x @ result.first @ result.second).square().sum() / wanted.square().sum())
        best = float(singular[rank:].square().sum() / singular.square().sum())
        assert result.relative_error == pytest.approx(error, rel=1e-8, abs=1e-14)
        assert error == pytest.approx(best, rel=1e-8, abs=1e-14)
        assert float(result.errors[rank]) == pytest.approx(best, rel=1e-8, abs=1e-14)


def test_bad_input_is_named():
    q, k = draws()
    with pytest.raises(RankError, match=r"rank 9 is not in 1\.\.8"):
        query_key_svd(q.mT @ q, k.mT @ k, 9)
    k[0, 0, 0] = torch.inf
    with pytest.raises(NumericalError, match="key gram has"):
        query_key_svd(q.mT @ q, k.mT @ k, 2)
