"""Claims about query/key column selection, each against explicit queries and keys."""

import itertools

import pytest
import torch

from modegpt_graph.decompose.cr import cr, cr_curve
from modegpt_graph.decompose.numerics import NumericalError, RankError

G, HEADS, SIZE, TOKENS = 2, 3, 12, 60
PAIRS = torch.stack([torch.arange(6), torch.arange(6) + 6], 1)
MIXED = [torch.stack([torch.arange(3), torch.arange(3) + 3], 1), torch.arange(6, 12)[:, None]]


def draws(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Q (G, HEADS, TOKENS, SIZE) and K (G, TOKENS, SIZE) with correlated columns of unequal size."""
    draw = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    mix = rand(G, SIZE, SIZE) * torch.rand(SIZE, dtype=torch.float64, generator=draw) ** 2
    return rand(G, HEADS, TOKENS, SIZE) @ mix[:, None] + 0.3, rand(G, TOKENS, SIZE) @ mix + 0.3


def grams(q, k):
    return q.mT @ q, k.mT @ k


def lost(q, k, result):
    wrong = whole = 0.0
    for group, head in itertools.product(range(G), range(HEADS)):
        kept = result.kept[group]
        query = q[group, head][:, kept]
        if result.query_factor is not None:
            query = query @ result.query_factor[group, head]
        wanted = q[group, head] @ k[group].mT
        wrong += float((wanted - query @ k[group][:, kept].mT).square().sum())
        whole += float(wanted.square().sum())
    return wrong / whole


@pytest.mark.parametrize("score", ["paper", "energy", "greedy"])
@pytest.mark.parametrize("scale", ["none", "real", "complex"])
@pytest.mark.parametrize(("blocks", "counts"), [([PAIRS], [4]), (MIXED, [2, 3]), (MIXED, [0, 4]), (MIXED, [3, 0])])
def test_the_reported_error_is_the_error_of_the_logits(score, scale, blocks, counts):
    q, k = draws()
    result = cr(*grams(q, k), blocks, counts, score=score, scale=scale)
    size = sum(kind.shape[1] * count for kind, count in zip(blocks, counts, strict=True))
    assert result.kept.shape == (G, size)
    assert bool((result.kept.diff(dim=1) > 0).all())
    assert result.relative_error == pytest.approx(lost(q, k, result), rel=1e-8)
    for group in range(G):
        kept = set(result.kept[group].tolist())
        for kind, count in zip(blocks, counts, strict=True):
            whole = [set(block) <= kept for block in kind.tolist()]
            assert sum(whole) == count
            assert all(inside or not set(block) & kept for inside, block in zip(whole, kind.tolist(), strict=True))


def test_the_papers_score_is_the_column_norms_of_the_roots():
    q, k = draws()
    cq, ck = grams(q, k)
    result = cr(cq, ck, [torch.arange(SIZE)[:, None]], [5])
    for group in range(G):
        values, vectors = torch.linalg.eigh(ck[group])
        key_norms = ((vectors * values.clamp_min(0).sqrt()) @ vectors.mT).norm(dim=0)
        total = torch.zeros(SIZE, dtype=torch.float64)
        for gram in cq[group]:
            values, vectors = torch.linalg.eigh(gram)
            total += (((vectors * values.clamp_min(0).sqrt()) @ vectors.mT).norm(dim=0) * key_norms).square()
        assert result.kept[group].tolist() == total.sqrt().topk(5).indices.sort().values.tolist()


def test_the_energy_of_a_pair_counts_its_cross_terms():
    """A pair whose two columns cancel in the logits is worth nothing, though each column is large."""
    q, k = draws()
    q[..., 6], k[..., 6] = 5.0 * q[..., 0], k[..., 0]
    q[..., 0], k[..., 0] = -5.0 * q[..., 0], k[..., 0]
    cq, ck = grams(q, k)
    by_paper, by_energy = (cr(cq, ck, [PAIRS], [5], score=score) for score in ("paper", "energy"))
    assert all(0 in kept for kept in by_paper.kept.tolist())
    assert all(0 not in kept for kept in by_energy.kept.tolist())
    assert by_energy.relative_error < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_each_step_of_greedy_adds_least_to_the_error(seed):
    q, k = draws(seed)
    cq, ck = grams(q, k)
    hadamard = cq.sum(1) * ck
    dropped: list[set[int]] = [set() for _ in range(G)]
    for count in range(5, 0, -1):
        result = cr(cq, ck, [PAIRS], [count], score="greedy")
        for group in range(G):
            now = {block for block, pair in enumerate(PAIRS.tolist()) if pair[0] not in result.kept[group]}
            costs = {}
            for block in set(range(len(PAIRS))) - dropped[group]:
                lost = PAIRS[sorted(dropped[group] | {block})].flatten()
                costs[block] = float(hadamard[group][lost][:, lost].sum())
            (added,) = now - dropped[group]
            assert costs[added] == pytest.approx(min(costs.values()), rel=1e-9)
            dropped[group] = now


def test_coefficients_never_hurt_and_turning_helps_more():
    q, k = draws()
    cq, ck = grams(q, k)
    errors = [
        cr(cq, ck, [PAIRS], [3], score="paper", scale=scale).relative_error for scale in ("none", "real", "complex")
    ]
    assert errors[0] > errors[1] > errors[2]


def test_coefficients_are_the_least_squares_solution_up_to_the_ridge():
    q, k = draws()
    result = cr(*grams(q, k), [PAIRS], [3], score="energy", scale="real")
    kept = result.kept[0]
    pairs = [pair for pair in PAIRS.tolist() if pair[0] in kept]
    parts = [(q[0, 1][:, pair] @ k[0][:, pair].mT).flatten() for pair in pairs]
    best = torch.linalg.lstsq(torch.stack(parts, 1), (q[0, 1] @ k[0].mT).flatten()[:, None]).solution.squeeze(1)
    assert result.query_factor is not None
    assert torch.allclose(result.query_factor[0, 1].diagonal()[:3], best, rtol=1e-4)


def test_a_turned_query_factor_commutes_with_rotation_of_its_pairs():
    q, k = draws()
    result = cr(*grams(q, k), [PAIRS], [3], scale="complex")
    assert result.query_factor is not None
    angles = torch.rand(6, dtype=torch.float64)
    rotation = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for (i, j), angle in zip(PAIRS.tolist(), angles, strict=True):
        rotation[i, i] = rotation[j, j] = angle.cos()
        rotation[i, j], rotation[j, i] = angle.sin(), -angle.sin()
    for group in range(G):
        kept = result.kept[group]
        part = rotation[kept][:, kept]
        factor = result.query_factor[group, 0]
        assert float((factor - torch.diag(factor.diagonal())).abs().max()) > 1e-6
        assert torch.allclose(part @ factor, factor @ part, atol=1e-12)


@pytest.mark.parametrize("score", ["paper", "energy", "greedy"])
@pytest.mark.parametrize("scale", ["none", "real", "complex"])
def test_the_curve_holds_the_error_of_every_rank(score, scale):
    q, k = draws()
    cq, ck = grams(q, k)
    curve = cr_curve(cq, ck, [PAIRS], score=score, scale=scale)
    assert curve.columns.tolist() == [12, 10, 8, 6, 4, 2, 0]
    assert float(curve.errors[0]) == 0.0
    assert float(curve.errors[-1]) == pytest.approx(1.0, rel=1e-9)
    for rank in (2, 4, 8):
        result = cr(cq, ck, [PAIRS], list(curve.counts_for(rank)), score=score, scale=scale)
        # The curve downdates with a ridge of 1e-6 of the mean diagonal, and so does the fit, on its own scale.
        assert curve.error_at(rank) == pytest.approx(result.relative_error, rel=1e-5)
    assert curve.counts_for(5) == (2,)


def test_several_kinds_share_a_rank_by_what_their_columns_cost():
    q, k = draws()
    q[..., 6:] *= 1e-3  # the single columns hardly count
    curve = cr_curve(*grams(q, k), MIXED, score="greedy")
    assert curve.counts_for(6) == (3, 0)
    assert bool((curve.errors.diff() >= -1e-12).all())


def test_full_rank_loses_nothing():
    q, k = draws()
    for scale in ("none", "complex"):
        result = cr(*grams(q, k), MIXED, [3, 6], scale=scale)
        assert result.relative_error == 0.0
        if result.query_factor is not None:
            assert torch.equal(result.query_factor[0, 0], torch.eye(SIZE, dtype=torch.float64))


def test_bad_input_is_named():
    q, k = draws()
    cq, ck = grams(q, k)
    with pytest.raises(RankError, match="7 blocks of 2 columns asked for where there are 6"):
        cr(cq, ck, [PAIRS], [7])
    with pytest.raises(RankError, match="no column would be kept"):
        cr(cq, ck, [PAIRS], [0])
    with pytest.raises(ValueError, match="do not name every one of 12 columns once"):
        cr(cq, ck, [PAIRS[:5]], [3])
    cq[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="query gram has 1 non-finite"):
        cr(cq, ck, [PAIRS], [3])
