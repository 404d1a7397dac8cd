"""No error that a solver expects, or that a solution has, is above what propositions 1 to 3 allow."""

import math
from dataclasses import replace

import pytest
import torch
from fixtures.families import FAMILIES, family, tokens

import modegpt_graph as mg
from modegpt_graph.compression import prepare
from modegpt_graph.models import resolve
from modegpt_graph.progress import Clock
from modegpt_graph.rewrite.bounds import site_bounds


@pytest.mark.parametrize(
    ("name", "preset"), [*((name, "default") for name in sorted(FAMILIES)), ("llama", "paper"), ("opt", "paper")]
)
def test_every_rank_of_every_site(name, preset):
    prepared = prepare(resolve(family(name)), calibration=tokens(), evaluating=False, preset=preset)
    decomposed = prepared.decomposed
    for item in decomposed.items:
        solver = decomposed.solvers[item.id]
        bounds = solver.bounds()
        assert bounds is not None
        if bounds.curve is not None:
            assert len(bounds.curve) == item.full_rank + 1
            assert bool((solver.errors <= bounds.curve * (1 + 1e-6) + 1e-9).all())
        for share in (0.3, 0.6, 0.9):
            solution = solver.solution(item.nearest(share * item.full_rank))
            (bound,) = bounds.of(solution)
            assert (bound is None) == (preset == "paper" and item.id.endswith("value-output"))
            if bound is not None:
                assert solution.relative_error is not None
                assert solution.relative_error <= bound * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("name", ["llama", "opt", "phi"])
def test_a_report_has_bound_and_curve_of_every_site(name):
    result = mg.compress(
        family(name), 0.4, calibration=tokens(), allocator="uniform", recalibrate=False, evaluate=False
    )
    outcome = result.report.outcome
    assert outcome is not None
    for site in outcome.sites:
        assert site.bound is not None
        assert site.relative_error is not None
        assert site.bound_holds is True
        assert math.isfinite(site.bound)
        assert site.rank in [point.rank for point in site.curve]
        ranks = [point.rank for point in site.curve]
        assert ranks == sorted(set(ranks))
        assert len(ranks) >= 3
        errors = [point.relative_error for point in site.curve]
        assert errors == sorted(errors, reverse=True)


def test_the_bound_is_of_this_run():
    """Other text, other statistics, other bounds."""
    one, other = (
        mg.compress(
            family("llama"),
            0.3,
            calibration=tokens(seed=seed),
            allocator="uniform",
            recalibrate=False,
            evaluate=False,
        )
        for seed in (0, 1)
    )
    assert one.report.outcome is not None
    assert other.report.outcome is not None
    pairs = list(zip(one.report.outcome.sites, other.report.outcome.sites, strict=True))
    assert all(first.rank == second.rank and first.bound != second.bound for first, second in pairs)


def test_matrices_that_were_fitted_again_have_the_bounds_of_their_decomposition_alone():
    prepared = prepare(resolve(family("llama")), calibration=tokens(), evaluating=False, recalibrate=False)
    ranks = prepared.decomposed.ranks(0.4, "uniform")
    built = prepared.build(ranks, Clock())
    again = {site: replace(one) if site.endswith("gated-mlp") else one for site, one in built.solutions.items()}
    outcome = prepared.result(ranks, 0.4, "uniform", "parameters", built=replace(built, solutions=again)).report.outcome
    assert outcome is not None
    assert {site.id for site in outcome.sites if site.bound is None} == {
        site for site in again if site.endswith("gated-mlp")
    }
    for site in outcome.sites:
        assert site.rank in [point.rank for point in site.curve]
        assert site.bound_holds is True


def test_sites_that_stay_whole_have_a_curve_and_no_bound():
    decomposed = prepare(resolve(family("llama")), calibration=tokens(), evaluating=False).decomposed
    found = site_bounds(decomposed.modules, decomposed.solvers, {})
    assert set(found) == {item.id for item in decomposed.items}
    assert all(one.bounds == () and len(one.curve) >= 3 for one in found.values())


def test_experts_have_each_their_own_bound_over_the_tokens_they_saw():
    from fixtures.library import build

    model = build("mixtral", "cpu")
    ids = tokens(16, 16)
    outcome = mg.compress(model, 0.3, calibration=ids, allocator="uniform", evaluate=False).report.outcome
    assert outcome is not None
    experts = [site for site in outcome.sites if site.tokens is not None]
    assert experts
    for site in experts:
        assert site.bound_holds is not False
        if site.tokens and site.bound is not None:
            assert site.relative_error is not None
            assert site.relative_error <= site.bound
    assert all(site.bound is not None for site in experts if site.tokens)
    assert torch.tensor([site.bound for site in experts if site.bound is not None]).isfinite().all()
