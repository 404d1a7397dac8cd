"""Logits get the scale at which they diverge least from others."""

import pytest
import torch
from torch import Tensor

from modegpt_graph.decompose.temperature import SCALES, best_scale, divergence_slopes

ROWS, VOCABULARY = 200, 50


def drawn(seed: int) -> Tensor:
    return 3 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def divergence(wanted: Tensor, logits: Tensor) -> float:
    one, other = wanted.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((one.exp() * (one - other)).sum())


def test_slopes_are_those_of_the_divergence() -> None:
    wanted, logits, direction = drawn(0), drawn(1), drawn(2)
    found = divergence_slopes(wanted, logits, direction)
    for scale, slope in zip(SCALES, found.tolist(), strict=True):
        above, below = (divergence(wanted, logits + (scale - 1 + step) * direction) for step in (1e-4, -1e-4))
        assert slope == pytest.approx((above - below) / 2e-4, rel=1e-4, abs=0.05)


def test_what_is_too_sure_is_scaled_to_where_it_diverges_least() -> None:
    wanted = drawn(0)
    unsure = wanted + 0.4 * drawn(1)
    scale = best_scale(divergence_slopes(wanted, unsure, unsure))
    assert 0.75 < scale < 0.95
    least = divergence(wanted, scale * unsure)
    assert least < min(divergence(wanted, other * unsure) for other in (1.0, scale - 0.02, scale + 0.02))


def test_the_same_logits_keep_their_scale() -> None:
    wanted = drawn(0)
    assert best_scale(divergence_slopes(wanted, wanted, wanted)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("sign", "expected"), [(1, SCALES[0]), (-1, SCALES[-1])])
def test_no_scale_is_beyond_the_first_and_last(sign: int, expected: float) -> None:
    assert best_scale(torch.linspace(0, 0.1, len(SCALES)) + sign) == expected


@pytest.mark.parametrize("logits", [torch.zeros(ROWS, VOCABULARY), torch.full((ROWS, VOCABULARY), torch.inf)])
def test_logits_that_tell_nothing_keep_their_scale(logits: Tensor) -> None:
    assert best_scale(divergence_slopes(logits, logits, logits)) == 1.0
