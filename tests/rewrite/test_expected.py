"""Few measurements tell what a rank costs, and it is known of which ranks they do not tell."""

import pytest
import torch

from modegpt_graph.allocate.budget import Item, Target
from modegpt_graph.rewrite.expected import NOISE, expected_divergences, is_told
from modegpt_graph.rewrite.ranks import curve_ranks

ERRORS = torch.tensor([1.0, 0.5, 0.1, 0.01, 1e-6, 0.0], dtype=torch.float64)  # at ranks 0 to 5


def test_divergence_is_linear_in_the_error_between_measurements_and_proportional_beyond() -> None:
    expected = expected_divergences(ERRORS, {4: 0.0, 2: 0.2, 1: 0.6})
    assert expected.tolist() == pytest.approx([1.2, 0.6, 0.2, 0.2 * (0.01 - 1e-6) / (0.1 - 1e-6), 0, 0], abs=2e-6)


def test_it_never_falls_with_the_rank_and_noise_only_breaks_ties() -> None:
    falling = expected_divergences(ERRORS, {3: 0.3, 2: 0.1})
    assert bool((falling[:-1] >= falling[1:]).all())
    tied = expected_divergences(ERRORS, {3: NOISE / 2})
    assert bool((tied[:-1] > tied[1:]).all())
    assert float(tied.max()) <= NOISE


def test_a_measurement_tells_of_errors_like_its_own_and_of_smaller_ones() -> None:
    assert is_told(ERRORS, {2: 0.1}, 5)
    assert is_told(ERRORS, {2: 0.1}, 3)
    assert not is_told(ERRORS, {2: 0.1}, 1)
    assert not is_told(ERRORS, {4: 0.0}, 2)
    assert not is_told(ERRORS, {4: 0.0, 1: 0.9}, 3)
    assert is_told(ERRORS, {4: 0.0, 2: 0.9}, 2)


class Cliff:
    """Half of the features carry next to nothing, a quarter almost all: at half rank nothing can be seen."""

    errors = torch.cat([torch.linspace(1, 1e-6, 17, dtype=torch.float64), torch.linspace(1e-6, 0, 49)[1:].double()])


def test_a_site_that_shows_nothing_at_half_rank_is_measured_where_it_would_be_cut() -> None:
    items = [Item("vital", 0, 64, 10), Item("harmless", 0, 64, 10)]  # of equals the first is cut first
    asked: list[dict[str, int]] = []

    def measure(ranks: dict[str, int]) -> dict[str, float]:
        asked.append(dict(ranks))
        return {site: float(Cliff.errors[rank]) * (9.0 if site == "vital" else 0.0) for site, rank in ranks.items()}

    half = {item.id: {32: 0.0} for item in items}
    ranks = curve_ranks(items, {item.id: Cliff() for item in items}, {}, half, measure, Target(1280, 0.8))
    assert any("vital" in ranks for ranks in asked)
    assert ranks["vital"] >= 16 > ranks["harmless"]
