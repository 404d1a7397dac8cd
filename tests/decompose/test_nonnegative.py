"""Least squares with unknowns that must not be negative: what is found cannot be bettered."""

import torch

from modegpt_graph.decompose.nonnegative import nonnegative


def test_it_meets_the_conditions_of_the_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 40, 8, generator=generator, dtype=torch.float64)
    gram = values.mT @ values / 40 + 0.1 * torch.eye(8, dtype=torch.float64)
    right = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    found = nonnegative(gram, right, torch.ones_like(right))
    slope = (gram @ found[..., None])[..., 0] - right
    assert (found >= 0).all()
    assert (found == 0).any()
    # Converged to rounding: the slope is none where the unknown is free, and upwards where it is at its bound.
    assert slope[found > 0].abs().max() < 1e-9
    assert slope[found == 0].min() > -1e-9


def test_without_a_bound_in_the_way_it_solves_the_equations() -> None:
    gram = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    wanted = torch.tensor([0.3, 0.7], dtype=torch.float64)
    found = nonnegative(gram, gram @ wanted, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found, wanted)
