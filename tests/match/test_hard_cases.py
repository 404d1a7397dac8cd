"""Hand-written decoders: each hard case in a form that is admitted and one that is refused, with the reason."""

from collections.abc import Callable

import pytest
from fixtures import fused, llama2c, nanogpt, torchtune_style
from fixtures.hard_cases import (
    Attention,
    Decoder,
    clipped,
    half_split,
    interleaved,
    partial,
    softmax_features,
    unit_length,
)
from torch import Tensor, nn

from modegpt_graph.match.analyse import survey
from modegpt_graph.match.sites import Analysis, Site
from modegpt_graph.trace.export import Trace

Analysed = Callable[[Callable[[], nn.Module]], Analysis]


@pytest.fixture(scope="session")
def analysed(traced: Callable[[Callable[[], nn.Module]], Trace], patterns) -> Analysed:
    def of(build: Callable[[], nn.Module]) -> Analysis:
        return survey(traced(build), patterns, "hand-written", "hand-written").analysis

    return of


def site(analysis: Analysis, pattern: str) -> Site:
    return next(one for one in analysis.sites if one.pattern == pattern and one.layer == 0)


def admitted(one: Site) -> bool:
    return one.decomposition is not None and one.certificate.holds


def rotated_and_clipped(x: Tensor) -> Tensor:
    return half_split(clipped(x))


@pytest.mark.parametrize(
    ("position", "commutant", "between"),
    [
        (half_split, "blocks", ("rotary (half-split)",)),
        (interleaved, "blocks", ("rotary (interleaved)",)),
        (partial, "blocks", ("rotary (half-split)",)),
        (rotated_and_clipped, "blocks", ("clamp", "rotary (half-split)")),
        (clipped, "columns", ("clamp",)),
    ],
)
def test_what_stands_on_query_and_key(
    analysed: Analysed, position: Callable[[Tensor], Tensor], commutant: str, between: tuple[str, ...]
) -> None:
    one = site(analysed(lambda: Decoder(Attention(position))), "query-key")
    assert admitted(one), one.reason
    assert (one.commutant, one.between, one.decomposition) == (commutant, between, "cr")


@pytest.mark.parametrize(
    ("position", "reason"),
    [
        (unit_length, "refused: linalg_vector_norm over the 8 features of a head"),
        (softmax_features, "refused: softmax over the 8 features of a head"),
    ],
)
def test_what_couples_all_features_is_refused_by_name(
    analysed: Analysed, position: Callable[[Tensor], Tensor], reason: str
) -> None:
    one = site(analysed(lambda: Decoder(Attention(position))), "query-key")
    assert (one.commutant, one.decomposition) == ("none", None)
    assert one.reason.startswith(reason)


def test_a_clipped_value_commutes_with_columns_but_not_with_mixing(analysed: Analysed) -> None:
    one = site(analysed(lambda: Decoder(Attention(value=clipped))), "value-output")
    assert admitted(one)
    assert (one.commutant, one.decomposition, one.type) == ("columns", "nystrom", "I")


def test_a_softmax_over_value_features_is_refused(analysed: Analysed) -> None:
    one = site(analysed(lambda: Decoder(Attention(value=softmax_features))), "value-output")
    assert one.decomposition is None
    assert "softmax over the 8 features of a head" in one.reason


@pytest.mark.parametrize(
    "form",
    [
        Attention(scores=lambda scores: (scores / 30).tanh() * 30),
        Attention(sinks=True),
        Attention(window=3),
        Attention(multiplier=0.3),
    ],
    ids=["softcap", "sinks", "window", "multiplier"],
)
def test_what_happens_to_scores_changes_nothing_at_the_pair(analysed: Analysed, form: Attention) -> None:
    analysis = analysed(lambda: Decoder(form))
    assert analysis.coverage == 1.0
    for pattern in ("query-key", "value-output"):
        assert admitted(site(analysis, pattern))
        assert site(analysis, pattern).commutant == "linear"


@pytest.mark.parametrize(
    ("mlp", "pattern", "variant", "kind", "commutant"),
    [
        ("plain", "mlp", "activated", "I", "columns"),
        ("relu2", "mlp", "activated", "I", "columns"),
        ("linear", "mlp", "linear", "III", "linear"),
        ("gated", "gated-mlp", "activated", "I", "columns"),
        ("swapped", "gated-mlp", "activated", "I", "columns"),
        ("bilinear", "gated-mlp", "bilinear", "I", "columns"),
        ("clamped", "gated-mlp", "activated-twice", "I", "columns"),
    ],
)
def test_mlps(analysed: Analysed, mlp: str, pattern: str, variant: str, kind: str, commutant: str) -> None:
    one = site(analysed(lambda: Decoder(mlp=mlp, residual=0.5)), pattern)
    assert admitted(one), one.reason
    assert (one.variant, one.type, one.commutant) == (variant, kind, commutant)
    assert one.decomposition == ("svd" if commutant == "linear" else "nystrom")


def test_either_order_of_the_product_finds_the_same_roles(analysed: Analysed) -> None:
    forms = [site(analysed(lambda form=form: Decoder(mlp=form)), "gated-mlp") for form in ("gated", "swapped")]
    assert forms[0].roles == forms[1].roles
    assert forms[0].roles["gate"].parameter == "blocks.0.mlp.gate.weight"


def test_a_gate_summed_over_features_is_a_near_miss_that_says_so(analysed: Analysed) -> None:
    analysis = analysed(lambda: Decoder(mlp="two-sources"))
    assert {one.pattern for one in analysis.sites} == {"query-key", "value-output"}
    down = next(one for one in analysis.unmatched if one.parameter == "blocks.0.mlp.down.weight")
    assert down.nearest_pattern == "gated-mlp"
    assert "expected the matrix `up`, found `cumsum` in `blocks.0.mlp` (hard_cases.py:" in down.reason
    assert "3 of 4 steps had matched, with `down`, `gate`" in down.reason


def test_a_shared_block_is_one_block(analysed: Analysed) -> None:
    once, shared = analysed(Decoder), analysed(lambda: Decoder(shared=True))
    assert len(once.sites) == 2 * len(shared.sites) == 6
    assert shared.coverage == 1.0
    assert all(admitted(one) for one in shared.sites)


class HalfShared(nn.Module):
    """Two layers whose MLPs share the second matrix only."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()
        self.decoder.blocks[1].mlp.down.weight = self.decoder.blocks[0].mlp.down.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(ids)


def test_a_matrix_shared_by_different_partners_is_refused(analysed: Analysed) -> None:
    mlps = [one for one in analysed(HalfShared).sites if one.pattern == "mlp"]
    assert mlps
    assert all(one.decomposition is None and "also used elsewhere" in one.reason for one in mlps)


class Leaking(nn.Module):
    """The MLP's activations are also read by the next layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(16, 16), "down": nn.Linear(16, 16)})])
        self.embedding, self.head = nn.Embedding(61, 16), nn.Linear(16, 61)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.layers[0]["up"](self.embedding(ids)).relu()
        return self.head(self.layers[0]["down"](hidden) + hidden.tanh())


def test_features_that_are_read_elsewhere_are_not_dropped(analysed: Analysed) -> None:
    one = site(analysed(Leaking), "mlp")
    assert one.decomposition is None
    assert "the features are also read by `tanh` (tanh)" in one.reason


@pytest.mark.parametrize(
    ("build", "between", "commutant"),
    [
        (nanogpt.GPT, (), "linear"),
        (lambda: nanogpt.GPT(flash=True, bias=False), (), "linear"),
        (llama2c.Transformer, ("rotary (interleaved)",), "blocks"),
        (lambda: llama2c.Transformer(is_complex=False), ("rotary (interleaved)",), "blocks"),
        (torchtune_style.TransformerDecoder, ("rotary (interleaved)",), "blocks"),
    ],
    ids=["nanogpt", "nanogpt-flash", "llama2c-complex", "llama2c-real", "torchtune"],
)
def test_other_styles(
    analysed: Analysed, build: Callable[[], nn.Module], between: tuple[str, ...], commutant: str
) -> None:
    analysis = analysed(build)
    assert analysis.coverage == 1.0
    assert not analysis.unmatched
    assert all(admitted(one) for one in analysis.sites)
    one = site(analysis, "query-key")
    assert (one.between, one.commutant) == (between, commutant)


def test_the_torchtune_style_with_norms_is_refused_by_their_names(analysed: Analysed) -> None:
    one = site(analysed(lambda: torchtune_style.TransformerDecoder(has_norms=True)), "query-key")
    assert one.decomposition is None
    assert "the norms `q_norm` and `k_norm` (rms_norm over the 8 features of a head)" in one.reason


def test_grouped_heads_of_one_fused_projection_half_of_each_rotated(analysed: Analysed) -> None:
    analysis = analysed(fused.Decoder)
    assert (analysis.coverage, analysis.unmatched) == (1.0, ())
    assert all(admitted(one) for one in analysis.sites)
    one = site(analysis, "query-key")
    assert (one.commutant, one.block_size, one.groups) == ("blocks", 2, fused.GROUPS)
    assert one.reason.endswith("whole blocks are kept; the other 4 features of a head are free")
    fourth = fused.GROUPS * fused.HEAD_DIM
    assert one.roles["query"].rows == ((0, fused.WIDTH),)
    assert one.roles["key"].rows == ((fused.WIDTH, fused.WIDTH + fourth),)
    assert site(analysis, "value-output").roles["value"].rows == ((fused.WIDTH + fourth, fused.WIDTH + 2 * fourth),)
    assert site(analysis, "gated-mlp").roles["gate"].parameter == "blocks.0.mlp.dense_h_to_4h.weight"
    assert site(analysis, "gated-mlp").roles["gate"].rows == ((0, fused.HIDDEN),)
