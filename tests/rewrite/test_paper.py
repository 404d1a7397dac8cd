"""`--preset paper` gives the numbers that MoDeGPT's algorithms give when they are written down once more, by hand."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.families import family, tokens
from torch import Tensor

import modegpt_graph as mg
from modegpt_graph.compression import Prepared, prepare
from modegpt_graph.errors import InputError
from modegpt_graph.models import resolve

CLOSE = {"rtol": 1e-6, "atol": 1e-8}  # float64 throughout; what differs is the order of sums and which root is taken


class Read:
    """A dense model's layer 0, what its matrices read on the calibration text, and what the preset made of them."""

    def __init__(self, name: str, ratio: float = 0.4) -> None:
        self.dense, self.ids = family(name, torch.float64), tokens(8, 24)
        self.prepared = prepare(resolve(self.dense), calibration=self.ids, evaluating=False, preset="paper")
        self.smaller: Any = self.prepared.at(ratio, "uniform").model

    def inputs(self, path: str) -> Tensor:
        """(T, N) what a matrix reads."""
        seen: list[Tensor] = []
        module = self.dense.get_submodule(path)
        handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
        with torch.no_grad():
            self.dense(self.ids)
        handle.remove()
        return seen[0]

    def matrices(self, path: str) -> tuple[Tensor, Tensor]:
        return tuple(model.get_submodule(path).weight for model in (self.dense, self.smaller))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def read() -> dict[str, Read]:
    """Grouped heads with rotary embedding; a value head for every output head, biases, nothing on queries and keys."""
    return {name: Read(name) for name in ("llama", "opt")}


def rows_of(small: Tensor, dense: Tensor) -> Tensor:
    """Which rows of the dense matrix the smaller one has."""
    return torch.cdist(small, dense, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("llama", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"),
        ("opt", "model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"),
    ],
)
def test_algorithm_1_keeps_the_largest_leverage_scores_and_refits_by_nystrom(
    read: dict[str, Read], name: str, up: str, down: str
) -> None:
    z = read[name].inputs(down)
    gram = z.T @ z
    identity = torch.eye(len(gram), dtype=gram.dtype) * gram.diagonal().mean()  # λ
    scores = (gram @ torch.linalg.inv(gram + identity)).diagonal()
    (dense_up, small_up), (dense_down, small_down) = read[name].matrices(up), read[name].matrices(down)
    kept = scores.topk(len(small_up)).indices.sort().values
    assert torch.equal(rows_of(small_up, dense_up), kept)
    refitted = torch.linalg.inv(gram[kept][:, kept]) @ gram[kept] @ dense_down.T
    torch.testing.assert_close(small_down.T, refitted, **CLOSE)
    biases = [model.get_submodule(down).bias for model in (read[name].dense, read[name].smaller)]
    assert biases[0] is None or torch.equal(*biases)


def test_algorithm_2_keeps_the_largest_norm_products_of_pairs_over_the_group(read: dict[str, Read]) -> None:
    path = "model.layers.0.self_attn"
    dense = read["llama"].dense
    x, heads = read["llama"].inputs(f"{path}.q_proj"), dense.config.num_attention_heads
    groups = dense.config.num_key_value_heads
    size = len(dense.get_submodule(f"{path}.q_proj").weight) // heads
    energies = []
    for role, count in (("q", heads), ("k", groups)):
        turned = (x @ dense.get_submodule(f"{path}.{role}_proj").weight.T).view(-1, count, size)
        # Rotary embedding turns each pair, which leaves the sum of its two squares alone but not the squares: so it
        # is applied, as the model does.
        embedded = rotated(dense, turned.view(*read["llama"].ids.shape, count, size)).flatten(0, 1)
        energies.append(embedded.square().sum(0))  # (heads, d) = diagonal of the Gram matrix = ‖C^{1/2}[:, i]‖²
    query, key = energies
    single = query.view(groups, heads // groups, size) * key[:, None]  # s_i² of every head
    pairs = single.sum(1).view(groups, 2, size // 2).sum(1)  # over the group and the pair (i, i + d/2)
    dense_key, small_key = read["llama"].matrices(f"{path}.k_proj")
    rank = len(small_key) // groups
    for group in range(groups):
        rows = rows_of(small_key.view(groups, rank, -1)[group], dense_key) - group * size
        expected = pairs[group].topk(rank // 2).indices.sort().values
        assert torch.equal(rows, torch.cat([expected, expected + size // 2]))


def rotated(model: Any, states: Tensor) -> Tensor:
    """(B, S, H, d) states after the rotary embedding."""
    cos, sin = model.model.rotary_emb(states, torch.arange(states.shape[1])[None])
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cos[:, :, None] + turned * sin[:, :, None]


def test_algorithm_2_also_where_nothing_stands_in_between(read: dict[str, Read]) -> None:
    path = "model.decoder.layers.0.self_attn"
    dense = read["opt"].dense
    x, heads = read["opt"].inputs(f"{path}.q_proj"), dense.config.num_attention_heads
    query, key = (dense.get_submodule(f"{path}.{role}_proj")(x).square().sum(0).view(heads, -1) for role in "qk")
    dense_key, small_key = read["opt"].matrices(f"{path}.k_proj")
    size, rank = query.shape[1], len(small_key) // heads
    for head in range(heads):
        rows = rows_of(small_key.view(heads, rank, -1)[head], dense_key) - head * size
        assert torch.equal(rows, (query * key)[head].topk(rank).indices.sort().values)


def test_algorithm_3_truncates_the_value_factor_alone_where_heads_are_grouped(read: dict[str, Read]) -> None:
    path = "model.layers.0.self_attn"
    dense = read["llama"].dense
    x = read["llama"].inputs(f"{path}.v_proj")
    heads, groups = dense.config.num_attention_heads, dense.config.num_key_value_heads
    (value, small_value), (out, small_out) = (read["llama"].matrices(f"{path}.{role}_proj") for role in "vo")
    size, rank = len(value) // groups, len(small_value) // groups
    root = square_root(x.T @ x)
    for head in range(heads):
        group = head // (heads // groups)
        w = value[group * size : (group + 1) * size].T  # (D, d)
        left, singular, right = torch.linalg.svd(root @ w, full_matrices=False)
        pair = torch.linalg.inv(root) @ left[:, :rank] * singular[:rank] @ right[:rank]
        expected = pair @ out[:, head * size : (head + 1) * size].T
        found = small_value[group * rank : (group + 1) * rank].T @ small_out[:, head * rank : (head + 1) * rank].T
        torch.testing.assert_close(found, expected, **CLOSE)


def test_algorithm_3_takes_the_second_svd_where_they_are_not(read: dict[str, Read]) -> None:
    path = "model.decoder.layers.0.self_attn"
    dense = read["opt"].dense
    x = read["opt"].inputs(f"{path}.v_proj")
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    heads = dense.config.num_attention_heads
    (value, small_value), (out, small_out) = (read["opt"].matrices(f"{path}.{role}") for role in ("v_proj", "out_proj"))
    augmented, small = (
        torch.cat([matrix, model.get_submodule(f"{path}.v_proj").bias[:, None]], 1)
        for matrix, model in ((value, dense), (small_value, read["opt"].smaller))
    )
    size, rank = len(value) // heads, len(small_value) // heads
    root = square_root(x.T @ x)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        left, singular, right = torch.linalg.svd(root @ augmented[own].T, full_matrices=False)
        inner, second, outer = torch.linalg.svd(singular[:, None] * right @ out[:, own].T, full_matrices=False)
        expected = left @ inner[:, :rank] * second[:rank] @ outer[:rank]
        found = small[head * rank : (head + 1) * rank].T @ small_out[:, head * rank : (head + 1) * rank].T
        # C is singular, since a LayerNorm's outputs and the constant depend on each other: seen through C^{1/2} only.
        torch.testing.assert_close(root @ found, expected, **CLOSE)


def square_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def test_the_ratio_is_spread_by_block_influence(read: dict[str, Read]) -> None:
    one = read["llama"]
    with torch.no_grad():
        states = one.dense.model(one.ids, output_hidden_states=True).hidden_states
    last: list[Tensor] = []
    handle = one.dense.model.layers[-1].register_forward_hook(lambda *call: last.append(call[2]))
    with torch.no_grad():
        one.dense(one.ids)
    handle.remove()
    states = [*states[:-1], last[0] if isinstance(last[0], Tensor) else last[0][0]]  # the last one given is normed
    scores = torch.stack([1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(states)])
    ratios = len(scores) * 0.2 * torch.softmax(-scores / 0.15, 0)
    ranks = one.prepared.decomposed.ranks(0.2, "block-influence")
    for item in one.prepared.decomposed.items:
        wanted = item.full_rank * (1 - float(ratios[item.layer or 0]))
        assert ranks[item.id] == pytest.approx(wanted, abs=item.multiple)


def test_errors_are_those_of_the_outputs_although_the_paper_fits_another_objective(read: dict[str, Read]) -> None:
    decomposed = read["llama"].prepared.decomposed
    site = next(item.id for item in decomposed.items if "value" in item.id)
    found = decomposed.solvers[site].solution(decomposed_rank(read["llama"].prepared, site))
    path = "model.layers.0.self_attn.o_proj"
    z = read["llama"].inputs(path)
    dense_out = read["llama"].matrices(path)[0]
    basis, (output, _) = (
        next(iter(found.maps.values())),
        next(iter(found.refits.values())),
    )  # (G, 1, d, k), (G, g, k, D)
    spread = (basis @ output).flatten(0, 2)
    error = (z @ (dense_out.T - spread)).square().sum() / (z @ dense_out.T).square().sum()
    assert found.relative_error == pytest.approx(float(error), rel=1e-9)


def decomposed_rank(prepared: Prepared, site: str) -> int:
    return prepared.decomposed.ranks(0.4, "uniform")[site]


def test_the_preset_is_named_in_the_report_and_unknown_ones_are_refused(read: dict[str, Read]) -> None:
    outcome = read["opt"].prepared.at(0.3).report.outcome
    assert outcome is not None
    assert (outcome.preset, outcome.allocator) == ("paper", "block-influence")
    with pytest.raises(InputError, match="unknown preset 'papier'; known: default, paper"):
        mg.compress(read["opt"].dense, 0.3, calibration=read["opt"].ids, preset="papier")


@pytest.mark.parametrize("name", ["opt", "phi", "gpt2"])
def test_what_it_makes_is_saved_and_read_back(name: str, tmp_path: Path) -> None:
    ids = tokens(8, 24)
    result = mg.compress(family(name), 0.4, calibration=ids, preset="paper", evaluate=False)
    result.save(tmp_path / "small")
    loaded: Any = mg.load(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits)
