"""Truncated SVDs: losses are the truncated singular values of the metric they are taken in."""

import pytest
import torch
from fixtures.families import FAMILIES
from torch import Tensor

from modegpt_graph.methods.inputs import Place, Values, observe
from modegpt_graph.methods.low_rank import asvd, scaled, svd, svd_llm, whitened
from modegpt_graph.methods.matrices import matrix_modules

RANK = 3


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, Values]:
    """Inputs (T, N), a matrix (D, N), and what is known of the inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 8, generator=generator, dtype=torch.float64) @ torch.randn(
        8, 8, generator=generator, dtype=torch.float64
    )
    matrix = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    augmented = torch.cat([inputs, torch.ones(60, 1, dtype=torch.float64)], dim=1)
    return inputs, matrix, Values(augmented.T @ augmented, inputs.abs().mean(0))


def truncated(matrix: Tensor, metric: Tensor) -> Tensor:
    """U_k U_kᵀ W with U from the matrix in a metric."""
    basis = torch.linalg.svd(metric, full_matrices=False).U[:, :RANK]
    return basis @ basis.T @ matrix


def test_whitened_loss_is_the_truncated_singular_values(problem) -> None:
    """SVD-LLM, section 3.1: ‖X (W − W_k)ᵀ‖² = Σ_{i>k} σ_i², and no matrix of that rank loses less."""
    inputs, matrix, read = problem
    white = whitened(matrix, read)
    lost = float((inputs @ (matrix - truncated(matrix, white)).T).square().sum())
    assert lost == pytest.approx(float(torch.linalg.svdvals(white)[RANK:].square().sum()), rel=1e-9)
    plain = float((inputs @ (matrix - truncated(matrix, matrix)).T).square().sum())
    assert lost < plain


def test_scaled_svd_is_the_paper_s(problem) -> None:
    """ASVD, equation 7: (W S)_k S⁻¹ with S = diag(mean |x|^½)."""
    inputs, matrix, read = problem
    diagonal = torch.diag(inputs.abs().mean(0).sqrt())
    torch.testing.assert_close(scaled(matrix, read), matrix @ diagonal)
    left, values, right = torch.linalg.svd(matrix @ diagonal, full_matrices=False)
    expected = left[:, :RANK] @ torch.diag(values[:RANK]) @ right[:RANK] @ torch.linalg.inv(diagonal)
    torch.testing.assert_close(truncated(matrix, scaled(matrix, read)), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_of_the_layers_can_be_replaced(name: str, setting) -> None:
    one = setting(name)
    assert {matrix.weight for matrix in matrix_modules(one)} == set(one.sizes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_what_is_counted_is_what_the_model_holds(name: str, setting) -> None:
    one = setting(name)
    smaller = svd(one)(0.3)
    held = [sum(p.numel() for p in model.parameters()) for model in (one.dense, smaller.model)]
    assert held[0] - held[1] == smaller.removed


def test_the_model_has_the_product_of_the_factors(setting) -> None:
    one = setting("llama")
    smaller = svd(one)(0.4).model.model.layers[1].mlp.down_proj
    dense = one.dense.model.layers[1].mlp.down_proj.weight
    product = smaller[1].weight @ smaller[0].weight
    values = torch.linalg.svdvals(dense.double())
    rank = smaller[0].out_features
    lost = float((dense - product).double().square().sum())
    assert lost == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)


def test_a_nearly_full_ratio_changes_little(setting) -> None:
    """At a rank that is nearly full every one of the three gives the dense model nearly back."""
    one = setting("llama")
    with torch.no_grad():
        dense = one.dense(one.tokens).logits
        for method in (svd, asvd, svd_llm):
            pass_ = method(one)
            near, far = (float((pass_(ratio).model(one.tokens).logits - dense).norm()) for ratio in (0.05, 0.6))
            assert near < far


def test_statistics_are_those_of_the_inputs(setting) -> None:
    one = setting("llama")
    module, seen = one.dense.model.layers[0].mlp.down_proj, []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        one.dense(one.tokens)
    handle.remove()
    rows = seen[0].flatten(0, 1).double()
    (values,) = observe(one, {"down": Place("model.layers.0.mlp.down_proj")}, "").values()
    torch.testing.assert_close(values.gram[:-1, :-1], rows.T @ rows, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(values.gram[-1, :-1], rows.sum(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(values.absolute, rows.abs().mean(0), rtol=1e-4, atol=1e-6)
