"""OWL's allocation keeps the mean, stays within its band, and spares layers with outliers."""

import pytest
import torch

from modegpt_graph.allocate.outliers import BAND, outlier_ratios


def test_layers_with_more_outliers_give_less_within_the_band() -> None:
    shares = torch.tensor([0.01, 0.05, 0.02, 0.09])
    ratios = outlier_ratios(shares, 0.4)
    assert float(ratios.mean()) == pytest.approx(0.4)
    assert torch.equal(ratios.argsort(), shares.argsort(descending=True))
    assert float(ratios.max() - ratios.min()) == pytest.approx(2 * BAND)


def test_equal_layers_give_alike() -> None:
    assert outlier_ratios(torch.full((3,), 0.02), 0.3).tolist() == pytest.approx([0.3] * 3)


def test_no_layer_gives_less_than_nothing_or_all() -> None:
    shares = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert float(outlier_ratios(shares, 0.01).min()) >= 0
    assert float(outlier_ratios(shares, 0.95).max()) <= 0.95
