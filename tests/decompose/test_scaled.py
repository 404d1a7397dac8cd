"""A matrix whose outputs scale features is moved to where less is left of a consumer's error."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from modegpt_graph.decompose.scaled import ScaledRows, scaled_direction, scaled_step_length

INPUTS, FEATURES, OUTPUTS, TOKENS = 5, 4, 6, 60


def rows(seed: int, passes: int = 2) -> list[ScaledRows]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(width: int) -> Tensor:
        return torch.randn(TOKENS, width, generator=generator, dtype=torch.float64)

    return [ScaledRows(drawn(INPUTS) @ mixed(), drawn(FEATURES), drawn(OUTPUTS)) for _ in range(passes)]


def mixed() -> Tensor:
    return torch.randn(INPUTS, INPUTS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def consumer() -> Tensor:
    return torch.randn(OUTPUTS, FEATURES, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def error(own: Sequence[ScaledRows], change: Tensor) -> float:
    return sum(float((one.left - one.moved(change, consumer())).square().sum()) for one in own)


def test_slopes_that_do_not_depend_on_inputs_give_least_squares() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(TOKENS, INPUTS, generator=generator, dtype=torch.float64)
    slopes = torch.randn(TOKENS, FEATURES, generator=generator, dtype=torch.float64)
    truth = torch.randn(FEATURES, INPUTS, generator=generator, dtype=torch.float64)
    every = ScaledRows(  # every slope with every input; each four times, of which the normal equations read one
        inputs.repeat_interleave(TOKENS, 0).repeat_interleave(4, 0),
        slopes.repeat(TOKENS, 1).repeat_interleave(4, 0),
        torch.zeros(4 * TOKENS**2, OUTPUTS, dtype=torch.float64),
    )
    every = ScaledRows(every.inputs, every.slopes, every.moved(truth, consumer()))
    change = scaled_direction([every], consumer(), feature_ridge=0.0, input_ridge=0.0)
    length = scaled_step_length([every], consumer(), change)
    torch.testing.assert_close(length * change, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_a_step_lowers_the_error(ridge: float) -> None:
    own = rows(1)
    change = scaled_direction(own, consumer(), feature_ridge=ridge, input_ridge=ridge)
    length = scaled_step_length(own, consumer(), change)
    assert length > 0
    assert error(own, length * change) < error(own, torch.zeros_like(change))
    assert error(own, length * change) < min(error(own, share * length * change) for share in (0.8, 1.2))


def test_rows_with_nothing_left_change_nothing() -> None:
    own = [ScaledRows(one.inputs, one.slopes, torch.zeros_like(one.left)) for one in rows(2)]
    change = scaled_direction(own, consumer(), feature_ridge=1.0, input_ridge=1.0)
    assert not change.any()
    assert scaled_step_length(own, consumer(), change) == 0.0


def test_the_step_is_as_long_as_other_rows_ask_for() -> None:
    own, change = rows(3), torch.ones(FEATURES, INPUTS, dtype=torch.float64)

    def asking(share: float) -> list[ScaledRows]:
        return [ScaledRows(one.inputs, one.slopes, share * one.moved(change, consumer())) for one in own]

    assert [scaled_step_length(asking(share), consumer(), change) for share in (-1.0, 0.25, 2.0)] == pytest.approx(
        [0.0, 0.25, 2.0]
    )
