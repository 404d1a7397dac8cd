"""What is found in decoders of the transformers library: types, commutants, layouts, rows and reasons."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modegpt_graph.match.analyse import Located, Survey, survey
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.sites import Site

Surveyed = Callable[[str], Survey]
HALF, INTERLEAVED = "rotary (half-split)", "rotary (interleaved)"

# model → (query/key's type, commutant, block size, between), groups and size of a group's features
QUERY_KEY = {
    "llama": ("II", "blocks", 2, (HALF,), 2, 8),
    "opt": ("III", "linear", 1, ("mul",), 4, 8),
    "gemma": ("II", "blocks", 2, (HALF,), 1, 8),
    "gemma2": ("II", "blocks", 2, (HALF,), 1, 8),
    "phi": ("II", "blocks", 2, (HALF,), 4, 16),
    "gpt-neox": ("II", "blocks", 2, (HALF,), 4, 16),
    "gpt2": ("III", "linear", 1, (), 4, 8),
    "phi3": ("II", "blocks", 2, (HALF,), 2, 8),
    "cohere": ("II", "blocks", 2, (INTERLEAVED,), 2, 8),
    "gptj": ("II", "blocks", 2, (INTERLEAVED,), 4, 8),
    "glm": ("II", "blocks", 2, (INTERLEAVED,), 2, 8),
    "bloom": ("III", "linear", 1, (), 4, 8),
    "falcon-old": ("II", "blocks", 2, (HALF,), 1, 8),
    "falcon-alibi": ("III", "linear", 1, (), 4, 8),
    "falcon-new": ("II", "blocks", 2, (HALF,), 2, 8),
    "mpt": ("III", "linear", 1, (), 4, 8),
    "olmo-clipped": ("II", "blocks", 2, ("clamp", HALF), 2, 8),
    "granite": ("II", "blocks", 2, (HALF,), 2, 8),
    "mistral-window": ("II", "blocks", 2, (HALF,), 2, 8),
    "gpt-oss": ("II", "blocks", 2, (HALF,), 2, 8),
}
GATED = ("llama", "gemma", "gemma2", "gemma3", "phi3", "cohere", "qwen3", "olmo2", "glm", "granite", "smollm3")
PLAIN = ("opt", "phi", "gpt-neox", "gpt2", "gptj", "bloom", "falcon-old", "falcon-new", "mpt")
NORMED = {
    "qwen3": "the norms `q_norm` and `k_norm` (mean over the 8 features of a head)",
    "gemma3": "the norms `q_norm` and `k_norm` (mean over the 8 features of a head)",
    "olmo2": "the norm `q_norm` (mean over all 32 features, across heads)",
}


def located(surveyed: Survey, pattern: str, layer: int = 0) -> Located:
    return next(one for one in surveyed.located if one.site.pattern == pattern and one.site.layer == layer)


def blocks(one: Located) -> list[tuple[int, int]]:
    """(size, count) of each kind of block."""
    assert one.layout is not None
    return [(kind.block_size, kind.count) for kind in one.layout.kinds]


@pytest.mark.parametrize("name", QUERY_KEY)
def test_query_key(library_survey: Surveyed, name: str) -> None:
    kind, commutant, block_size, between, groups, size = QUERY_KEY[name]
    site = located(library_survey(name), "query-key").site
    assert (site.type, site.commutant, site.block_size, site.between) == (kind, commutant, block_size, between)
    assert (site.paper_type, site.groups, site.full_rank) == ("II", groups, size)
    assert site.decomposition == ("svd" if commutant == "linear" else "cr")
    assert site.nonlinearities == (0 if commutant == "linear" else 2)


@pytest.mark.parametrize("name", [*QUERY_KEY, *NORMED, "smollm3"])
def test_every_admitted_site_has_a_certificate_that_holds(library_survey: Surveyed, name: str) -> None:
    admitted = [site for site in library_survey(name).analysis.sites if site.decomposition is not None]
    assert admitted
    for site in admitted:
        assert site.certificate.holds, site
        assert site.certificate.method == "both"
        assert site.certificate.max_error is not None
        assert site.certificate.max_error < 1e-12


@pytest.mark.parametrize("name", GATED)
def test_gated_mlp(library_survey: Surveyed, name: str) -> None:
    site = located(library_survey(name), "gated-mlp").site
    assert (site.type, site.commutant, site.decomposition, site.full_rank) == ("I", "columns", "nystrom", 48)
    assert site.between in (("silu", "mul"), ("gelu", "mul"))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_mlp(library_survey: Surveyed, name: str) -> None:
    site = located(library_survey(name), "mlp").site
    assert (site.type, site.commutant, site.decomposition) == ("I", "columns", "nystrom")


def test_an_activation_of_several_operations_is_said_to_be_one_function(library_survey: Surveyed) -> None:
    site = located(library_survey("gpt2"), "mlp").site
    assert site.between == ("mul", "pow", "add", "tanh")
    assert site.reason.startswith("mul, pow, add and tanh together are one function of each feature")


@pytest.mark.parametrize("name", [*QUERY_KEY, *NORMED])
def test_value_output(library_survey: Surveyed, name: str) -> None:
    site = located(library_survey(name), "value-output").site
    expected = ("I", "columns", "nystrom") if name == "olmo-clipped" else ("III", "linear", "svd")
    assert (site.type, site.commutant, site.decomposition) == expected


@pytest.mark.parametrize("name", NORMED)
def test_a_norm_on_query_and_key_is_named_in_the_refusal(library_survey: Surveyed, name: str) -> None:
    site = located(library_survey(name), "query-key").site
    assert (site.commutant, site.decomposition, site.block_size) == ("none", None, None)
    assert site.reason.startswith(f"refused: {NORMED[name]}"), site.reason


@pytest.mark.parametrize(("name", "free"), [("phi", 8), ("gpt-neox", 12), ("gptj", 4), ("glm", 4)])
def test_partial_rotary_leaves_the_rest_free(library_survey: Surveyed, name: str, free: int) -> None:
    one = located(library_survey(name), "query-key")
    assert blocks(one) == [(2, (one.site.full_rank - free) // 2), (1, free)]
    assert f"the other {free} features of a head are free" in one.site.reason


def test_layers_without_rotary_are_linear(library_survey: Surveyed) -> None:
    surveyed = library_survey("smollm3")
    commutants = {located(surveyed, "query-key", layer).site.commutant for layer in (0, 1)}
    assert commutants == {"blocks", "linear"}


def test_half_split_pairs_are_half_a_head_apart(library_survey: Surveyed) -> None:
    layout = located(library_survey("llama"), "query-key").layout
    assert layout is not None
    pairs = layout.kinds[0].positions
    assert torch.equal(pairs[..., 1] - pairs[..., 0], torch.full((2, 4), 4))


def test_grouped_queries_share_their_keys_pairs(library_survey: Surveyed) -> None:
    layout = located(library_survey("llama"), "query-key").layout
    assert layout is not None
    assert layout.members["query"].shape == (2, 2, 8)  # (groups, heads of a group, features)
    assert torch.equal(layout.members["query"].reshape(-1), torch.arange(32))
    assert torch.equal(layout.members["key"], torch.arange(16).view(2, 1, 8))


def by_head(part: int, parts: int, heads: int = 4, d: int = 8) -> Tensor:
    """Rows of one part of a projection with rows (head, part, d)."""
    return torch.arange(heads * parts * d).view(heads, parts, d)[:, part].reshape(-1)


def by_part(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count)


# model → rows of query, key and value in the fused projection
FUSED = {
    "gpt2": [by_part(0, 32), by_part(32, 32), by_part(64, 32)],
    "mpt": [by_part(0, 32), by_part(32, 32), by_part(64, 32)],
    "phi3": [by_part(0, 32), by_part(32, 16), by_part(48, 16)],
    "gpt-neox": [by_head(part, 3, d=16) for part in range(3)],
    "bloom": [by_head(part, 3) for part in range(3)],
    "falcon-alibi": [by_head(part, 3) for part in range(3)],
    "falcon-old": [by_part(0, 32), by_part(32, 8), by_part(40, 8)],
    "falcon-new": [
        torch.arange(64).view(2, 4, 8)[:, :2].reshape(-1),
        torch.arange(64).view(2, 4, 8)[:, 2].reshape(-1),
        torch.arange(64).view(2, 4, 8)[:, 3].reshape(-1),
    ],
}


def rows(site: Site, role: str) -> list[int]:
    return [row for start, stop in site.roles[role].rows for row in range(start, stop)]


@pytest.mark.parametrize("name", FUSED)
def test_rows_of_fused_projections(library_survey: Surveyed, name: str) -> None:
    surveyed = library_survey(name)
    scores, mixed = located(surveyed, "query-key").site, located(surveyed, "value-output").site
    query, key, value = FUSED[name]
    assert rows(scores, "query") == query.tolist()
    assert rows(scores, "key") == key.tolist()
    assert rows(mixed, "value") == value.tolist()
    assert len({scores.roles["query"].parameter, scores.roles["key"].parameter, mixed.roles["value"].parameter}) == 1


def test_rows_of_a_fused_gate_and_up(library_survey: Surveyed) -> None:
    site = located(library_survey("phi3"), "gated-mlp").site
    assert site.roles["gate"].parameter == site.roles["up"].parameter
    assert (rows(site, "gate"), rows(site, "up")) == (list(range(48)), list(range(48, 96)))


@pytest.mark.parametrize("name", [*QUERY_KEY, *NORMED])
def test_every_matrix_is_in_one_place(library_survey: Surveyed, name: str) -> None:
    surveyed = library_survey(name)
    analysis = surveyed.analysis
    trace = surveyed.located[0].outline.graph.trace
    wanted = {n for n, p in trace.module.named_parameters() if p.ndim >= 2 and any(c.isdigit() for c in n.split("."))}
    in_sites = {role.parameter for site in analysis.sites for role in site.roles.values()}
    left = {one.parameter for one in analysis.unmatched}
    assert in_sites | left == wanted
    assert not in_sites & left
    if name != "gpt-oss":
        assert analysis.coverage == 1.0


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("name", "variant", "gate", "up"),
    [
        ("mixtral", "activated", range(48), range(48, 96)),
        ("qwen2-moe", "activated", range(16), range(16, 32)),
        ("gpt-oss", "activated-twice", range(0, 96, 2), range(1, 96, 2)),
    ],
)
def test_every_expert_of_a_tensor_is_a_site(
    library_survey: Surveyed, name: str, variant: str, gate: range, up: range
) -> None:
    """The rows of all experts of a tensor are numbered through, whichever way it is stored."""
    sites = [site for site in library_survey(name).analysis.sites if site.id.startswith(EXPERTS)]
    assert [site.id for site in sites] == [f"{EXPERTS}.{expert}:gated-mlp" for expert in range(4)]
    for expert, site in enumerate(sites):
        assert (site.type, site.commutant, site.decomposition) == ("I", "columns", "nystrom")
        assert (site.variant, site.full_rank, site.groups) == (variant, len(gate), 1)
        assert site.certificate.method == "both"
        assert site.certificate.holds
        assert site.roles["gate"].parameter == site.roles["up"].parameter == f"{EXPERTS}.gate_up_proj"
        assert rows(site, "gate") == [2 * len(gate) * expert + row for row in gate]
        assert rows(site, "up") == [2 * len(gate) * expert + row for row in up]
        assert site.roles["down"].parameter == f"{EXPERTS}.down_proj"
        assert rows(site, "down") == list(range(32 * expert, 32 * (expert + 1)))


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "gpt-oss"])
def test_all_but_the_routers_is_covered_once(library_survey: Surveyed, name: str) -> None:
    surveyed = library_survey(name)
    model = surveyed.located[0].outline.graph.trace.module
    left = [one for one in surveyed.analysis.unmatched if not one.parameter.endswith("bias")]
    routers = sum(model.get_parameter(one.parameter).numel() for one in left)
    assert all("its product goes to" in one.reason for one in left)
    total = surveyed.analysis.model.decoder_linear_parameters
    assert surveyed.analysis.coverage == pytest.approx(1 - routers / total)


def test_a_shared_expert_is_a_site_beside_the_others(library_survey: Surveyed) -> None:
    site = located(library_survey("qwen2-moe"), "gated-mlp").site
    assert ".shared_expert." in site.roles["down"].parameter
    assert site.full_rank == 32


def test_expert_biases_are_no_matrices(library_survey: Surveyed) -> None:
    analysis = library_survey("gpt-oss").analysis
    bias = next(one for one in analysis.unmatched if one.parameter.endswith("down_proj_bias"))
    assert bias.reason.startswith("it is no matrix of a linear map")


def test_latent_attention_is_three_sites(library_survey: Surveyed) -> None:
    """The part without positions is linear, the one with them is made of pairs, and values share a matrix with keys."""
    surveyed = library_survey("deepseek-v3")
    plain, turned = (located(surveyed, f"query-key-{part}").site for part in ("first", "second"))
    mixed = located(surveyed, "value-output").site
    assert (plain.type, plain.paper_type, plain.commutant, plain.decomposition) == ("III", "II", "linear", "svd")
    assert (turned.type, turned.commutant, turned.block_size, turned.decomposition) == ("II", "blocks", 2, "cr")
    assert (mixed.commutant, mixed.decomposition) == ("linear", "svd")
    made = torch.arange(64).view(4, 2, 8)  # (head, key or value, feature) in the matrix after the latent's norm
    assert rows(plain, "key") == made[:, 0].reshape(-1).tolist()
    assert rows(mixed, "value") == made[:, 1].reshape(-1).tolist()
    assert plain.roles["key"].parameter == mixed.roles["value"].parameter
    query = torch.arange(48).view(4, 12)
    assert rows(plain, "query") == query[:, :8].reshape(-1).tolist()
    assert rows(turned, "query") == query[:, 8:].reshape(-1).tolist()
    assert rows(turned, "key") == [16, 17, 18, 19]
    left = {one.parameter.removeprefix("model.layers.0.") for one in surveyed.analysis.unmatched}
    assert "self_attn.q_a_proj.weight" in left


def test_state_space_layers_are_left_alone_and_the_rest_is_found(library_survey: Surveyed) -> None:
    analysis = library_survey("mamba").analysis
    assert all("what `conv1d` does to them is not known" in site.reason for site in analysis.sites)
    assert not any(site.decomposition for site in analysis.sites)
    reasons = {one.parameter.rpartition("mixer.")[2]: one.reason for one in analysis.unmatched}
    assert "kernel of a convolution over positions" in reasons["conv1d.weight"]
    assert reasons["A_log"].startswith("it is no matrix of a linear map: its values are used one by one, by `exp`")
    assert all(reasons.values())
    mixed = {site.pattern for site in library_survey("jamba").analysis.sites if site.decomposition}
    assert mixed == {"gated-mlp", "query-key", "value-output"}


def test_without_a_pattern_its_sites_are_gone(library_survey: Surveyed, library_trace, patterns) -> None:
    kept: list[Pattern] = [pattern for pattern in patterns if pattern.name != "query-key"]
    analysis = survey(library_trace("llama"), kept, "llama", "llama").analysis
    assert {site.pattern for site in analysis.sites} == {"gated-mlp", "value-output"}
    assert {one.parameter.split(".")[-2] for one in analysis.unmatched} == {"q_proj", "k_proj"}
    assert analysis.coverage < library_survey("llama").analysis.coverage
