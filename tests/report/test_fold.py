from dataclasses import replace

import pytest

from modegpt_graph.match.sites import Certificate, Role, Unmatched
from modegpt_graph.report.fold import fold_sites, fold_unmatched, ranges


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([3], "3"),
        (range(32), "0-31"),
        ([7, 0, 2, 5, 4, 6, 4], "0, 2, 4-7"),
        ([0, 1], "0-1"),
    ],
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text


def test_equal_layers_are_one_group_with_the_largest_probe_error(samples):
    groups = fold_sites([samples.mlp(layer) for layer in range(32)])
    assert [group.layers for group in groups] == ["0-31"]
    assert groups[0].example.roles["down"].parameter == "model.layers.*.mlp.down_proj.weight"
    assert groups[0].example.certificate.max_error == 2.2e-16 + 31e-18
    assert groups[0].per_layer == 1


@pytest.mark.parametrize(
    "change",
    [
        {"variant": "up first"},
        {"between": ("gelu", "mul")},
        {"commutant": "none"},
        {"decomposition": None},
        {"reason": "something else"},
        {"full_rank": 1024},
        {"groups": 2},
        {"type": "III"},
        {"certificate": Certificate("probed", 2.2e-16, True)},
        {"certificate": Certificate("both", 0.5, False)},
        {"certificate": Certificate("both", None, True)},
        {"roles": {"gate": Role("model.layers.1.mlp.gate_proj.weight", ((0, 1536),))}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_layer_that_differs_in_anything_shown_is_a_group_of_its_own(samples, change):
    sites = [samples.mlp(0), samples.mlp(1, **change), samples.mlp(2)]
    assert [group.layers for group in fold_sites(sites)] == ["0, 2", "1"]


def test_matrices_that_differ_in_their_name_beyond_indices_are_not_equal(samples):
    other = samples.mlp(1)
    roles = {role: replace(one, parameter=one.parameter.replace("mlp", "ffn")) for role, one in other.roles.items()}
    assert len(fold_sites([samples.mlp(0), replace(other, roles=roles)])) == 2


def test_experts_of_a_layer_are_counted(samples):
    experts = next(group for group in fold_sites(samples.normed().sites) if group.example.pattern == "gated-mlp")
    assert (experts.layers, experts.per_layer, len(experts.sites)) == ("0-27", 4, 112)


def test_a_reason_that_names_the_layers_own_matrix_does_not_part_the_layers(samples):
    sites = [
        samples.mlp(layer, reason=f"model.layers.{layer}.mlp.up_proj.weight is read by nothing else")
        for layer in range(12)
    ]
    (group,) = fold_sites(sites)
    assert group.example.reason == "model.layers.*.mlp.up_proj.weight is read by nothing else"


def test_unmatched_matrices_are_one_line_with_the_range_in_their_name():
    entries = [
        Unmatched(f"layers.{layer}.router.weight", None, f"layers.{layer}.router feeds topk") for layer in (0, 1, 2, 5)
    ]
    (group,) = fold_unmatched(entries)
    assert group.parameter == "layers.{0-2, 5}.router.weight"
    assert group.example.reason == "layers.*.router feeds topk"
    assert len(fold_unmatched([*entries, Unmatched("layers.6.router.weight", "mlp", "no product")])) == 2
