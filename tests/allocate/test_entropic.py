import pytest
import torch

from modegpt_graph.allocate.entropic import entropic_ratios, temperature_for, uniform_ratios
from modegpt_graph.errors import InputError

SCORES = torch.tensor([0.9, 0.1, 0.05, 0.2, 0.4], dtype=torch.float64)


def test_it_is_the_closed_form_where_no_layer_reaches_the_cap():
    expected = 5 * 0.3 * torch.softmax(-SCORES / 0.5, 0)
    assert torch.allclose(entropic_ratios(SCORES, 0.3, 0.5), expected, atol=1e-14)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("temperature", [1e-6, 0.02, 0.1, 1.0, float("inf")])
def test_the_mean_is_exact_and_no_layer_exceeds_the_cap(ratio, temperature):
    ratios = entropic_ratios(SCORES, ratio, temperature)
    assert float(ratios.mean()) == pytest.approx(ratio, abs=1e-12)
    assert float(ratios.max()) <= 0.95 + 1e-12
    assert float(ratios.min()) >= 0
    order = SCORES.argsort()
    assert bool((ratios[order].diff() <= 1e-12).all())  # a more important layer never gives more


def test_no_feasible_shift_between_two_layers_improves_the_capped_objective():
    temperature, cap = 0.1, 0.6
    ratios = entropic_ratios(SCORES, 0.4, temperature, largest=cap)
    assert float(ratios.max()) == pytest.approx(cap)

    def objective(phi):
        return float((SCORES * (1 - phi) - temperature * phi * phi.log()).sum())

    for giver in range(5):
        for taker in range(5):
            moved = ratios.clone()
            moved[giver] -= 1e-4
            moved[taker] += 1e-4
            if giver != taker and float(moved.max()) <= cap:
                assert objective(moved) < objective(ratios)


def test_weights_make_the_weighted_mean_exact():
    weights = torch.tensor([3.0, 1.0, 3.0, 1.0, 2.0], dtype=torch.float64)
    ratios = entropic_ratios(SCORES, 0.6, 0.2, weights=weights)
    assert float((ratios * weights).sum() / weights.sum()) == pytest.approx(0.6, abs=1e-12)


def test_infinite_temperature_is_uniform():
    assert torch.allclose(entropic_ratios(SCORES, 0.3, float("inf")), uniform_ratios(5, 0.3))


def test_the_temperature_makes_the_largest_ratio_what_was_asked():
    for ratio in (0.2, 0.3, 0.5):
        temperature = temperature_for(SCORES, ratio, largest=0.8)
        assert float(entropic_ratios(SCORES, ratio, temperature).max()) == pytest.approx(0.8, rel=1e-6)


def test_equal_scores_or_a_ratio_beyond_the_largest_give_uniform():
    assert temperature_for(torch.ones(4), 0.3) == float("inf")
    assert temperature_for(SCORES, 0.85) == float("inf")


def test_where_too_few_layers_can_reach_the_largest_the_coldest_is_given():
    temperature = temperature_for(torch.tensor([0.1, 0.2]), 0.3, largest=0.8)
    assert float(entropic_ratios(torch.tensor([0.1, 0.2]), 0.3, temperature).max()) == pytest.approx(0.6, rel=1e-3)


def test_bad_input_is_one_line_and_says_what():
    with pytest.raises(InputError, match=r"ratio 0\.99 is outside 0\.\.0\.95"):
        entropic_ratios(SCORES, 0.99, 0.1)
    with pytest.raises(InputError, match="1 of 2 importance scores"):
        entropic_ratios(torch.tensor([torch.nan, 1.0]), 0.3, 0.1)
    with pytest.raises(InputError, match="temperature 0 is not positive"):
        entropic_ratios(SCORES, 0.3, 0.0)
