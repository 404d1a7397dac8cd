"""A consumer is corrected by least squares that holds back features of all sizes alike."""

import pytest
import torch
from torch import Tensor

from modegpt_graph.decompose.correction import correction, step_length

TOKENS, FEATURES, OUTPUTS = 40, 5, 3


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found(features: Tensor, left: Tensor, ridge: float, bias: bool) -> tuple[Tensor, Tensor | None]:
    full = torch.cat([features, features.new_ones(TOKENS, 1)], dim=1)
    return correction(full.mT @ full, full.mT @ left, ridge=ridge, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
def test_the_change_minimises_what_is_left_and_its_own_size_on_each_feature(bias: bool) -> None:
    features, left, ridge = drawn(TOKENS, FEATURES, seed=1) + 0.5, drawn(TOKENS, OUTPUTS, seed=2), 0.3
    change, offset = found(features, left, ridge, bias)
    spread = features - features.mean(0) if bias else features
    held_back = ridge**0.5 * torch.diag(spread.norm(dim=0))
    rows = torch.cat([spread, held_back])
    wanted = torch.cat([left - left.mean(0) if bias else left, left.new_zeros(FEATURES, OUTPUTS)])
    torch.testing.assert_close(change, torch.linalg.lstsq(rows, wanted).solution)
    assert (offset is not None) == bias
    if offset is not None:
        torch.testing.assert_close(offset, (left - features @ change).mean(0))


def test_a_massive_feature_leaves_what_the_others_do_as_it_is() -> None:
    features, left = drawn(TOKENS, FEATURES, seed=3), drawn(TOKENS, OUTPUTS, seed=4)
    sizes = torch.tensor([1.0, 1e4, 1.0, 1e-3, 1.0], dtype=torch.float64)
    plain, _ = found(features, left, 0.1, bias=False)
    change, _ = found(features * sizes, left, 0.1, bias=False)
    torch.testing.assert_close(sizes[:, None] * change, plain)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_feature_that_never_changes_is_left_alone(value: float) -> None:
    features, left = drawn(TOKENS, FEATURES, seed=5), drawn(TOKENS, OUTPUTS, seed=6)
    features[:, 2] = value
    change, offset = found(features, left, 0.1, bias=True)
    assert change[2].abs().max() < 1e-6
    assert offset is not None
    assert bool(torch.isfinite(change).all())


def test_a_step_goes_no_further_than_other_rows_gain_by() -> None:
    features, truth = drawn(2 * TOKENS, FEATURES, seed=7), drawn(FEATURES, OUTPUTS, seed=8)
    gram = torch.zeros(FEATURES + 1, FEATURES + 1, dtype=torch.float64)
    gram[:-1, :-1] = features.mT @ features
    pull = torch.cat([features.mT @ features @ truth, torch.zeros(1, OUTPUTS, dtype=torch.float64)])
    assert step_length(gram, pull, truth, None) == pytest.approx(1.0)
    assert step_length(gram, pull, 4 * truth, None) == pytest.approx(0.25)
    assert step_length(gram, pull, 0.5 * truth, None) == 1.0
    assert step_length(gram, pull, -truth, None) == 0.0
