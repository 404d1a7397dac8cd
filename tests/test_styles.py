"""Decoders written by hand in styles of their own: found, rewritten without loss, compressed, saved and loaded."""

from pathlib import Path

import pytest
import torch
from fixtures import styles

import modegpt_graph as mg

TOLERANCE = 1e-5  # of the largest logit, float32: sums in another order move it by about 1e-6

# style → sites of a layer, and the matrices of a layer that belong to none of them
EXPECTED = {
    "heads in a list": (9, set()),
    "torch's own attention": (3, set()),
    "einsum": (3, set()),
    "axes for heads": (3, {"attention.query_bias", "attention.value_bias"}),
    "broadcast to heads": (3, set()),
    "no softmax": (3, {"attention.gate.weight"}),
    "talking heads": (4, set()),  # what mixes the heads is a pair too: each mixed head has a softmax of its own
    "written in place": (3, set()),
    "joint projections": (9, set()),
}


@pytest.mark.parametrize("style", EXPECTED)
def test_all_of_it_is_found_and_a_shuffled_rewrite_changes_nothing(style: str) -> None:
    model, example_inputs = styles.decoder(style)
    report = mg.analyze(model, example_inputs=example_inputs)
    count, left = EXPECTED[style]
    assert [one.reason for one in report.sites if one.decomposition is None] == []
    assert len(report.sites) == styles.LAYERS * count
    assert all(one.certificate.holds for one in report.sites)
    assert {one.parameter.removeprefix("blocks.0.") for one in report.unmatched if ".0." in one.parameter} == left
    named = model.blocks.named_parameters()  # type: ignore[union-attr]
    sizes = {name: p.numel() for name, p in named if p.ndim > 1 and not name.endswith("bias")}
    own = sum(size for name, size in sizes.items() if name.partition(".")[2] not in left)
    assert report.coverage == pytest.approx(own / sum(sizes.values()))
    proof = mg.verify(model, example_inputs=example_inputs)
    assert proof.sites == len(report.sites)
    assert proof.max_relative_error < TOLERANCE


@pytest.mark.parametrize("style", EXPECTED)
def test_what_is_saved_is_what_was_compressed(style: str, tmp_path: Path) -> None:
    model, example_inputs = styles.decoder(style)
    tokens = torch.randint(styles.VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(0))
    result = mg.compress(model, 0.3, calibration=tokens, example_inputs=example_inputs)
    assert result.report.to_json()["compression"]["ratios"]["decoder_linear"] == pytest.approx(0.3, abs=0.03)
    result.save(tmp_path / "small")
    loaded = mg.load(tmp_path / "small", factory=lambda: styles.decoder(style))
    with torch.no_grad():
        dense, expected, found = (one(tokens) for one in (model, result.model, loaded))
    assert torch.equal(expected, found)
    assert (expected - dense).norm() < 0.5 * dense.norm()
