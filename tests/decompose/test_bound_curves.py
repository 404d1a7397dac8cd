"""At every rank, on features as chance and as training make them, nothing is lost beyond its bound."""

import pytest
import torch

from modegpt_graph.decompose.bound_curves import (
    cr_bounds,
    nystrom_bounds,
    projection_bound,
    query_key_bounds,
    value_output_bounds,
)
from modegpt_graph.decompose.bounds import cr_bound, nystrom_bound
from modegpt_graph.decompose.cr import cr_curve
from modegpt_graph.decompose.elimination import eliminate_in_order
from modegpt_graph.decompose.numerics import energy, mean_diagonal
from modegpt_graph.decompose.nystrom import consumer, leverage_scores, refit_rows, surgeon_order
from modegpt_graph.decompose.refit import refit
from modegpt_graph.decompose.svd import query_key_svd
from modegpt_graph.decompose.value_output import fit_outputs, value_output_svd

ROUNDING = 1 + 1e-9


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features(count: int, kind: str, seed: int = 0, tokens: int = 200) -> torch.Tensor:
    """(tokens, count). trained: a falling spectrum, columns of unequal size, one token of massive activation."""
    if kind == "chance":
        return rand(tokens, count, seed=seed)
    falling = torch.arange(1, count + 1, dtype=torch.float64) ** -1.2
    mixed = (rand(tokens, count, seed=seed) * falling) @ rand(count, count, seed=seed + 1)
    mixed = mixed * (1.5 * rand(count, seed=seed + 2)).exp()
    mixed[0, 3] = 500.0 * mixed.abs().max()
    return mixed


@pytest.mark.parametrize("kind", ["chance", "trained"])
@pytest.mark.parametrize("selection", ["leverage", "surgeon"])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_proposition_1_at_every_rank_with_the_ridge_that_is_used(kind, selection, ridge, with_bias):
    z, down = features(24, kind) + 0.3, rand(24, 7, seed=5)
    z = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], dim=1)
    bias = rand(7, seed=6) if with_bias else None
    problem = consumer(z.mT @ z, down, bias)
    if selection == "surgeon":
        found = surgeon_order(z.mT @ z, down, ridge=ridge, bias=bias)
    else:
        order = leverage_scores(problem.gram, 1.0).argsort()
        found = eliminate_in_order(problem.gram, problem.weight, order, ridge=ridge, total=problem.total)
    most = nystrom_bounds(problem.gram, problem.weight, found.order, found.ridge, found.leaves)
    for rank in range(1, 25):
        lost = refit_rows(problem, found.kept(rank), ridge).relative_error * problem.total
        assert lost <= float(most[rank]) * ROUNDING + 1e-12 * problem.total
        assert float(found.errors[rank]) * problem.total <= float(most[rank]) * ROUNDING + 1e-12 * problem.total
    assert float(most[24]) == 0.0


def test_a_factor_that_is_known_and_one_that_is_not_give_the_same_bounds():
    z, down = features(12, "trained"), rand(12, 5)
    found = eliminate_in_order(z.mT @ z, down, torch.randperm(12), ridge=1e-2)
    known = nystrom_bounds(z.mT @ z, down, found.order, found.ridge, found.leaves)
    assert torch.allclose(known, nystrom_bounds(z.mT @ z, down, found.order, found.ridge), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["chance", "trained"])
def test_without_a_ridge_it_is_never_above_proposition_1(kind):
    z, down = features(12, kind), rand(12, 5)
    gram, order = z.mT @ z, torch.randperm(12, generator=torch.Generator().manual_seed(0))
    most = nystrom_bounds(gram, down, order, 0.0)
    for rank in range(1, 12):
        assert float(most[rank]) <= nystrom_bound(gram, down, order[12 - rank :].sort().values) * ROUNDING


@pytest.mark.parametrize("kind", ["chance", "trained"])
@pytest.mark.parametrize("score", ["paper", "energy", "greedy"])
@pytest.mark.parametrize("scale", ["none", "real", "complex"])
@pytest.mark.parametrize("sizes", [[1], [2], [2, 1]])
def test_proposition_2_at_every_step_of_every_selection(kind, score, scale, sizes):
    d, heads = 12, 3
    queries = torch.stack([torch.stack([features(d, kind, seed=10 * g + h) for h in range(heads)]) for g in range(2)])
    keys = torch.stack([features(d, kind, seed=100 + g) for g in range(2)])
    cq, ck = queries.mT @ queries, keys.mT @ keys
    per_kind = torch.arange(d).split(d // len(sizes))
    blocks = [columns.view(size, -1).mT for size, columns in zip(sizes, per_kind, strict=True)]
    curve = cr_curve(cq, ck, blocks, score=score, scale=scale)
    most = cr_bounds(cq, ck, blocks, curve, score=score, scale=scale)
    total = float((cq.sum(1) * ck).sum())
    assert bool((curve.errors * total <= most * ROUNDING + 1e-12 * total).all())
    assert float(most[0]) == 0.0
    if score == "paper" and len(sizes) == 1:
        for step in range(len(most)):
            rank = int(curve.columns[step])
            paper = sum(cr_bound(cq[g], ck[g], rank, block_size=sizes[0]) for g in range(2))
            assert float(most[step]) <= paper * ROUNDING


@pytest.mark.parametrize("kind", ["chance", "trained"])
def test_proposition_3_for_query_and_key_at_every_rank(kind):
    d = 10
    queries = torch.stack([torch.stack([features(d, kind, seed=10 * g + h) for h in range(2)]) for g in range(2)])
    keys = torch.stack([features(d, kind, seed=100 + g) for g in range(2)])
    cq, ck = queries.mT @ queries, keys.mT @ keys
    most, errors = query_key_bounds(cq, ck), query_key_svd(cq, ck, d).errors
    total = float((cq.sum(1) * ck).sum())
    assert bool((errors * total <= most * ROUNDING + 1e-7 * total).all())
    assert float(most[0]) <= total * ROUNDING
    assert float(most[d]) == 0.0


@pytest.mark.parametrize("kind", ["chance", "trained"])
@pytest.mark.parametrize("heads", [1, 3])
def test_proposition_3_for_value_and_output_at_every_rank(kind, heads):
    d, groups = 8, 2
    outputs = features(groups * heads * d, kind)
    gram, weight = outputs.mT @ outputs, rand(groups * heads * d, 11, seed=4)
    blocks = torch.arange(len(gram)).view(groups, heads, d)
    grams, output = gram[blocks[..., :, None], blocks[..., None, :]], weight.view(groups, heads, d, -1)
    closed = value_output_svd(grams, output, d, sweeps=0)
    whole, joint = float(energy(grams, output).sum()), float(energy(gram, weight))
    most = value_output_bounds(grams, output, closed.basis)
    assert bool((closed.errors * whole <= most * ROUNDING + 1e-7 * whole).all())
    for rank in (1, 3, 7):
        found = value_output_svd(grams, output, rank)
        basis = found.basis[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
        prior = found.output.flatten(0, 2)
        fitted = refit(gram, basis, weight, ridge=1e-2, prior=prior)
        drawn = (found.basis[:, None] @ fit_outputs(grams, found.basis, grams @ output)).flatten(0, 2)
        at_most = projection_bound(gram, weight, basis, drawn, 1e-2 * mean_diagonal(gram))
        assert fitted.relative_error * joint <= at_most * ROUNDING
