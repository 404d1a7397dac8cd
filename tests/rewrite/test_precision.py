"""Rounded products are rounded by no more than is said, only where they are asked for, and only in single precision."""

import torch

from modegpt_graph.models.precision import rounded_products


def test_only_single_precision_is_rounded_and_only_within():
    left, right = torch.randn(2, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = left.float().double() @ right.float().double()
    with rounded_products():
        rounded, double = left.float() @ right.float(), left @ right
    after = left.float() @ right.float()
    largest = left.abs() @ right.abs()
    assert ((rounded - exact).abs() <= 2.0**-7 * largest).all()
    assert ((after - exact).abs() <= 2.0**-18 * largest).all()
    assert torch.equal(double, left @ right)
