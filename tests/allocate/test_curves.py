import itertools

import pytest
import torch

from modegpt_graph.allocate.budget import Item, Target, ranks_for_ratios, removed_cost
from modegpt_graph.allocate.curves import allocate_by_curves
from modegpt_graph.errors import InputError


def cost(curves: dict[str, torch.Tensor], ranks: dict[str, int]) -> float:
    return sum(float(curve[ranks[name]]) for name, curve in curves.items())


def power(item: Item, exponent: float) -> torch.Tensor:
    """A convex error curve, 1 at rank 0 and 0 at full rank."""
    return (1 - torch.arange(item.full_rank + 1, dtype=torch.float64) / item.full_rank) ** exponent


def test_convex_curves_give_the_best_of_all_allocations():
    items = [Item("a", 0, 6, 10, minimum=0), Item("b", 0, 6, 10, minimum=0), Item("c", 1, 6, 10, minimum=0)]
    curves = {"a": power(items[0], 1.5), "b": 0.5 * power(items[1], 3.0), "c": 2 * power(items[2], 2.0)}
    for removed in range(0, 19):
        ranks = allocate_by_curves(items, curves, Target(180, removed / 18 if removed < 18 else 0.99999))
        assert removed_cost(items, ranks) == removed * 10
        best = min(
            cost(curves, dict(zip("abc", choice, strict=True)))
            for choice in itertools.product(range(7), repeat=3)
            if 18 - sum(choice) == removed
        )
        assert cost(curves, ranks) == pytest.approx(best, rel=1e-12)


def test_the_budget_is_met_with_steps_of_many_sizes_and_it_beats_uniform():
    items = []
    for layer in range(10):
        items += [
            Item(f"{layer}.a", layer, 128, 300),
            Item(f"{layer}.b", layer, 16, 900),
            Item(f"{layer}.c", layer, 32, 450),
        ]
    total = sum(item.full_rank * item.cost_per_rank for item in items)
    draw = torch.Generator().manual_seed(0)
    curves = {}
    for item in items:
        drops = torch.rand(item.full_rank, dtype=torch.float64, generator=draw) ** 4  # not convex
        curve = torch.cat([drops.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]) / drops.sum()
        curves[item.id] = curve * torch.rand(1, generator=draw)
    for ratio in (0.1, 0.3, 0.5, 0.8):
        ranks = allocate_by_curves(items, curves, Target(total, ratio))
        assert removed_cost(items, ranks) / total == pytest.approx(ratio, abs=0.005)
        uniform = ranks_for_ratios(items, {item.layer: ratio for item in items}, Target(total, ratio))
        assert cost(curves, ranks) < cost(curves, uniform)


def test_an_item_that_costs_nothing_goes_first_and_one_that_costs_much_stays():
    items = [Item("free", 0, 50, 10), Item("dear", 0, 50, 10)]
    curves = {"free": torch.zeros(51), "dear": power(items[1], 2.0)}
    ranks = allocate_by_curves(items, curves, Target(1000, 0.3))
    assert ranks == {"free": 20, "dear": 50}


def test_a_cliff_is_not_stopped_at_its_edge():
    """A curve that is flat, then steep: the flat part goes, whatever hides behind it."""
    items = [Item("cliff", 0, 10, 10), Item("slope", 0, 10, 10)]
    cliff = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    ranks = allocate_by_curves(items, {"cliff": cliff, "slope": power(items[1], 1.0)}, Target(200, 0.2))
    assert ranks == {"cliff": 6, "slope": 10}


def test_a_dear_first_step_does_not_hide_what_follows_for_free():
    items = [Item("step", 0, 10, 10, minimum=0), Item("slope", 0, 10, 10, minimum=0)]
    step = torch.tensor([0.3] * 10 + [0.0], dtype=torch.float64)
    ranks = allocate_by_curves(items, {"step": step, "slope": power(items[1], 1.0)}, Target(200, 0.5))
    assert ranks == {"step": 0, "slope": 10}


def test_bad_curves_and_budgets_are_named():
    items = [Item("a", 0, 10, 10)]
    with pytest.raises(ValueError, match=r"a: 5 costs for ranks 0\.\.10"):
        allocate_by_curves(items, {"a": torch.zeros(5)}, Target(100, 0.3))
    with pytest.raises(InputError, match="not finite"):
        allocate_by_curves(items, {"a": torch.full((11,), torch.nan)}, Target(100, 0.3))
    with pytest.raises(InputError, match=r"at most 0\.9000"):
        allocate_by_curves(items, {"a": torch.zeros(11)}, Target(100, 0.95))
