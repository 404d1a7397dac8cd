import pytest
import torch

from modegpt_graph.decompose.numerics import (
    NumericalError,
    RankError,
    check_gram,
    check_rank,
    factorise,
    inverse_square_root,
    ridge_solve,
    square_root,
)
from modegpt_graph.errors import InputError, ModegptError


def gram_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.mT @ values


def test_non_finite_entries_are_counted_in_one_line():
    gram = gram_of(20, 5)
    gram[0, 1] = gram[1, 0] = torch.nan
    gram[2, 2] = torch.inf
    with pytest.raises(NumericalError, match=r"^layer 7: gram has 3 non-finite entries of 25; .* --dtype float32$"):
        check_gram(gram, "layer 7: gram")
    assert issubclass(NumericalError, ModegptError)


def test_a_matrix_that_is_not_symmetric_or_has_a_negative_diagonal_is_no_gram_matrix():
    gram = gram_of(20, 5)
    gram[0, 1] += 1.0
    with pytest.raises(NumericalError, match="not symmetric"):
        check_gram(gram)
    with pytest.raises(NumericalError, match="negative diagonal"):
        check_gram(-gram_of(20, 5))


def test_a_rank_out_of_range_is_the_users_to_mend():
    with pytest.raises(RankError, match=r"rank 9 is not in 1\.\.8"):
        check_rank(9, 8)
    assert issubclass(RankError, InputError)


def test_roots_square_to_the_matrix_and_to_its_inverse():
    gram = gram_of(40, 8)
    assert torch.allclose(square_root(gram) @ square_root(gram), gram, rtol=0, atol=1e-11 * gram.max())
    root = inverse_square_root(gram, 0.0)
    assert torch.allclose(root @ gram @ root, torch.eye(8, dtype=torch.float64), atol=1e-10)


def test_the_inverse_root_of_a_singular_matrix_stays_bounded():
    gram = gram_of(3, 8)  # rank 3
    root = inverse_square_root(gram, 1e-6)
    limit = (1e-6 * float(gram.diagonal().mean())) ** -0.5
    assert float(torch.linalg.matrix_norm(root, 2)) <= limit * (1 + 1e-9)


def test_a_singular_matrix_gets_the_least_ridge_that_makes_it_solvable():
    gram = gram_of(3, 8)
    factor = factorise(gram, 0.0)
    mean = float(gram.diagonal().mean())
    assert 0 < factor.ridge < 1e-8 * mean
    right = gram @ torch.ones(8, 1, dtype=torch.float64)  # in the range, so a solution exists
    assert torch.allclose(gram @ ridge_solve(gram, right, 0.0), right, rtol=1e-6)


def test_a_sound_matrix_gets_exactly_the_ridge_asked_for():
    gram = gram_of(40, 8)
    assert factorise(gram, 0.0).ridge == 0.0
    assert factorise(gram, 1e-3).ridge == pytest.approx(1e-3 * float(gram.diagonal().mean()), rel=1e-12)


def test_scale_alone_does_not_trip_the_guard():
    scale = torch.logspace(
        -9, 9, 8, dtype=torch.float64
    )  # one massive channel, one faint: condition 1e36, yet well posed
    gram = gram_of(40, 8) * scale[:, None] * scale
    assert factorise(gram, 0.0).ridge == 0.0


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(NumericalError, match="stays singular"):
        factorise(torch.tensor([[1.0, 9.0], [9.0, 1.0]], dtype=torch.float64), 0.0)
