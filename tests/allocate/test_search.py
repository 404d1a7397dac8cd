"""A goal is met from below, near it, by few measurements, whatever the prediction got wrong."""

import math

import pytest

from modegpt_graph.allocate.search import NEAR, TRIES, largest_within


@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("power", [0.8, 1.0, 1.6])
@pytest.mark.parametrize("limit", [0.02, 0.1, 0.5])
def test_a_prediction_off_by_a_factor_and_a_power_is_corrected(factor, power, limit):
    def predict(ratio):
        return ratio**2

    def cost(ratio):
        return factor * predict(ratio) ** power

    tries = largest_within(predict, cost, limit, 0.9)
    assert len(tries) <= TRIES
    assert tries[-1].measured <= limit
    assert tries[-1].measured == cost(tries[-1].ratio)
    assert tries[-1].measured >= NEAR * limit or tries[-1].ratio == pytest.approx(0.9, abs=2e-3)
    assert tries[-1].ratio == max(one.ratio for one in tries if one.measured <= limit)


def test_the_second_prediction_has_learnt_from_the_first_measurement():
    first, second, *_ = largest_within(lambda ratio: ratio**2, lambda ratio: 5 * ratio**2, 0.1, 0.9)
    assert first.predicted == pytest.approx(first.ratio**2)
    assert second.predicted == pytest.approx(5 * second.ratio**2)


def test_noise_in_what_is_measured_leaves_the_limit_kept():
    def cost(ratio):
        return 0.8 * ratio**2 * (1 + 0.3 * math.sin(90 * ratio))

    tries = largest_within(lambda ratio: ratio**2, cost, 0.1, 0.9)
    assert tries[-1].measured <= 0.1
    assert tries[-1].ratio > 0.2


def test_a_model_that_gets_better_gives_all_that_it_can():
    tries = largest_within(lambda ratio: ratio, lambda ratio: -0.1, 0.05, 0.6)
    assert tries[-1].ratio == pytest.approx(0.6, abs=0.02)


def test_where_nothing_is_within_the_limit_nothing_is_given_after_a_bounded_number_of_tries():
    count = []

    def cost(ratio):
        count.append(ratio)
        return 1.0

    assert largest_within(lambda ratio: ratio, cost, 0.1, 0.9) == ()
    assert len(count) <= 12
