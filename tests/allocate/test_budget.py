import pytest

from modegpt_graph.allocate.budget import TOLERANCE, Item, Target, meet, ranks_for_ratios, reachable_ratio, removed_cost
from modegpt_graph.errors import InputError


def decoder(layers: int = 30, intermediate: int = 1536, hidden: int = 576, pairs: int = 32, values: int = 64):
    """Items of a grouped decoder (9 query heads, 3 key heads) and its linear parameters, some of them in no item."""
    items = []
    for layer in range(layers):
        items.append(Item(f"{layer}.mlp", layer, intermediate, 3 * hidden))
        items.append(Item(f"{layer}.qk", layer, pairs, 2 * 12 * hidden))
        items.append(Item(f"{layer}.vo", layer, values, 12 * hidden))
    covered = sum(item.full_rank * item.cost_per_rank for item in items)
    return items, covered


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("size", [{}, {"layers": 2, "intermediate": 48, "hidden": 32, "pairs": 4, "values": 8}])
@pytest.mark.parametrize("uncovered", [0.0, 0.05])
def test_the_budget_is_met_within_half_a_point(ratio, size, uncovered):
    items, covered = decoder(**size)
    total = int(covered / (1 - uncovered))
    ranks = ranks_for_ratios(items, {item.layer: ratio for item in items}, Target(total, ratio))
    assert removed_cost(items, ranks) / total == pytest.approx(ratio, abs=0.005)
    assert all(item.minimum <= ranks[item.id] <= item.full_rank for item in items)


def test_on_a_real_size_the_budget_is_met_to_the_finest_step():
    items, total = decoder()
    ranks = ranks_for_ratios(items, {item.layer: 0.3 for item in items}, Target(total, 0.3))
    assert abs(removed_cost(items, ranks) - 0.3 * total) <= min(item.cost_per_rank for item in items) / 2


def test_layers_keep_their_shares():
    items, total = decoder(layers=4)
    wanted = {0: 0.1, 1: 0.2, 2: 0.4, 3: 0.5}
    ranks = ranks_for_ratios(items, wanted, Target(total, 0.3))
    for item in items:
        # One step of its own by rounding, and a percentage point because the others' rounding is made up for.
        assert 1 - ranks[item.id] / item.full_rank == pytest.approx(wanted[item.layer], abs=1 / item.full_rank + 0.01)


def test_what_is_in_no_item_is_made_up_for_by_the_items():
    items, covered = decoder()
    ranks = ranks_for_ratios(items, {item.layer: 0.3 for item in items}, Target(2 * covered, 0.3))
    assert removed_cost(items, ranks) / covered == pytest.approx(0.6, abs=0.001)


def test_items_at_their_minimum_pass_the_rest_on():
    items = [Item("a", 0, 100, 10, minimum=90), Item("b", 1, 100, 10)]
    ranks = ranks_for_ratios(items, {0: 0.5, 1: 0.5}, Target(2000, 0.5))
    assert ranks == {"a": 90, "b": 10}


def test_multiples_and_minima_are_kept():
    items = [Item(str(layer), layer, 100, 7, minimum=9, multiple=8) for layer in range(50)]
    ranks = ranks_for_ratios(items, dict.fromkeys(range(50), 0.37), Target(35000, 0.37))
    assert all(rank == 100 or (rank % 8 == 0 and rank >= 16) for rank in ranks.values())
    assert removed_cost(items, ranks) / 35000 == pytest.approx(0.37, abs=0.005)


@pytest.mark.parametrize("percent", [5, 9, 31, 45, 55, 91])
def test_steps_of_two_sizes_make_a_finer_one(percent):
    """Steps of 30 and of 50 out of 1,900 pass over half a point, but 50 − 30 and 2·30 − 50 do not."""
    items = [Item("coarse", 0, 20, 50, minimum=0), Item("fine", 1, 30, 30, minimum=0)]
    ratio = percent / 100
    ranks = ranks_for_ratios(items, {0: ratio, 1: ratio}, Target(1900, ratio))
    assert abs(removed_cost(items, ranks) - 19 * percent) <= 9.5


def test_an_unreachable_ratio_names_the_largest_reachable_one():
    items = [Item("a", 0, 10, 10, minimum=5)]
    assert reachable_ratio(items, 200) == 0.25
    with pytest.raises(InputError, match=r"^ratio 0\.3 cannot be reached: .* at most 0\.2500 .*; ask for less$"):
        ranks_for_ratios(items, {0: 0.3}, Target(200, 0.3))


def test_a_ratio_between_two_steps_names_the_nearest():
    items = [Item("a", 0, 4, 25)]
    with pytest.raises(InputError, match=r"falls between two steps of rank; the nearest that can be met is 0\.2500"):
        ranks_for_ratios(items, {0: 0.3}, Target(100, 0.3))


def test_the_same_input_gives_the_same_ranks():
    items, total = decoder(layers=5)
    ratios = {layer: 0.1 + 0.1 * layer for layer in range(5)}
    assert ranks_for_ratios(items, ratios, Target(total, 0.3)) == ranks_for_ratios(items, ratios, Target(total, 0.3))


def test_coarse_steps_of_two_sizes_meet_a_ratio_together():
    """Single steps end beside the target; several together, some of them back, come to it."""
    items = [Item("a", 0, 8, 700), Item("b", 0, 8, 1100)]
    total = sum(item.full_rank * item.cost_per_rank for item in items)
    for removed in (4 * 700 + 1 * 1100, 1 * 700 + 3 * 1100, 6 * 700 + 2 * 1100):
        ranks = meet(items, {"a": 8, "b": 8}, Target(total, removed / total), lambda item, rank, new: 0.0)
        assert removed_cost(items, ranks) == pytest.approx(removed, abs=TOLERANCE / 2 * total)
