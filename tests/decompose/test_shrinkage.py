"""Gram matrices with the products of different features drawn towards zero."""

import pytest
import torch
from torch import Tensor

from modegpt_graph.decompose.nystrom import nystrom
from modegpt_graph.decompose.shrinkage import chance_share, share_left, shrunk


def augmented(features: Tensor) -> Tensor:
    """[X, 1]ᵀ [X, 1]."""
    rows = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
    return rows.T @ rows


def text(shared: float, seed: int, tokens: int = 4000) -> Tensor:
    """(T, 8) features, of which the last four go with the first four as far as `shared` says, about a mean."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    own[:, 4:] = shared * own[:, :4] + (1 - shared**2) ** 0.5 * own[:, 4:]
    return own + 0.5


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sizes_and_means_stay_and_products_lose_their_share(share: float) -> None:
    features = text(0.8, seed=0)
    before, after = augmented(features), shrunk(augmented(features), share)
    assert torch.allclose(after.diagonal(), before.diagonal())
    assert torch.equal(after[-1], before[-1])
    products = [(one / len(features))[:-1, :-1] - 0.5**2 for one in (before, after)]
    assert float(products[0][0, 4]) == pytest.approx(0.8, abs=0.05)
    assert float(products[1][0, 4]) == pytest.approx((1 - share) * 0.8, abs=0.05)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_an_error_there_tells_of_the_one_that_was_seen(share: float) -> None:
    gram = augmented(text(0.99, seed=1))
    left = share_left(gram, share)
    assert 0 < left < 1
    difference = torch.linalg.eigvalsh(shrunk(gram, share) - left * gram)
    assert float(difference.min()) > -1e-9 * float(gram.diagonal().max())


def test_of_few_tokens_chance_explains_what_goes_together() -> None:
    noise = torch.randn(12, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert chance_share(augmented(noise)) > 0.8
    assert chance_share(augmented(noise[:, :1] + 0.01 * noise)) < 0.2
    assert chance_share(augmented(text(0.3, seed=2))) < 0.1


def test_of_no_tokens_nothing_is_believed() -> None:
    nothing = torch.zeros(41, 41, dtype=torch.float64)
    assert torch.equal(shrunk(nothing, chance_share(nothing)), torch.eye(41, dtype=torch.float64))
    assert share_left(nothing, 1.0) == 0.0


def test_a_refit_loses_less_of_text_in_which_features_go_together_less() -> None:
    gram, other = (augmented(text(shared, seed)) for shared, seed in ((0.9, 3), (0.2, 4)))
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def lost(share: float, on: Tensor) -> float:
        found = nystrom(shrunk(gram, share), weight, 4, ridge=0.0, kept=torch.arange(4))
        difference = weight.clone()
        difference[:4] -= found.down
        return float(((on[:-1, :-1] @ difference) * difference).sum())

    assert lost(0.5, other) < 0.8 * lost(0.0, other)
    assert lost(0.0, gram) < lost(0.5, gram)  # what was calibrated on has its minimum without
