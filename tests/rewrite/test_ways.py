"""What a module does at other sizes, with other arguments or in another dtype stays what it was, or is left alone."""

import copy
from collections.abc import Callable

import pytest
import torch
from fixtures import ways
from torch import Tensor, nn

import modegpt_graph as mg
from modegpt_graph.errors import InputError
from modegpt_graph.match.prepare import Surveyed, read_patterns, survey_model
from modegpt_graph.models import resolve
from modegpt_graph.rewrite.apply import rewrite
from modegpt_graph.rewrite.solution import Solution

TOLERANCE = 1e-5  # of the largest logit, float32: sums in another order move it by about 1e-6
SIZES = [(2, 6), (1, 1), (3, 1), (1, 9), (2, 3), (2, 8), (2, 40)]  # (B, S); the trace is made at (2, 5)
PATTERNS = read_patterns()


def decoder(attention: Callable[[], nn.Module], calls: ways.Calls = ways.once) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ways.Decoder(attention, calls).eval().requires_grad_(False)


def surveyed(model: nn.Module) -> Surveyed:
    return survey_model(resolve(model, example_inputs=(torch.zeros(2, 6, dtype=torch.long),)), PATTERNS)


def halved(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(the model with half of every site's features, the model in which the others are zero)."""
    modules = surveyed(model).modules()
    generator = torch.Generator().manual_seed(0)
    solutions, small, zeroed = {}, copy.deepcopy(model), copy.deepcopy(model)
    for one in modules:
        for placed in one.placed:
            layout, outline = placed.footprint.layout, placed.footprint.outline
            dropped = torch.ones(layout.groups, layout.size, dtype=torch.bool)
            kept = []
            for kind in layout.kinds:
                orders = torch.stack([torch.randperm(kind.count, generator=generator) for _ in range(layout.groups)])
                kept.append(orders[:, : kind.count // 2])
                dropped.scatter_(1, kind.positions[torch.arange(layout.groups)[:, None], kept[-1]].flatten(1), False)
            solutions[placed.site.id] = Solution(tuple(kept))
            for role, linear in outline.linears.items():
                features = layout.members[role].transpose(1, 2)[dropped].flatten()
                owner = zeroed.get_submodule(one.path).get_submodule(linear.weight.rpartition(".")[0])
                assert isinstance(owner, nn.Linear)
                if role in outline.producers:
                    owner.weight[features], owner.bias[features] = 0.0, 0.0
                else:
                    owner.weight[:, features] = 0.0
    rewrite(small, modules, solutions)
    return small, zeroed


def largest_change(one: nn.Module, other: nn.Module, ids: Tensor) -> float:
    before, after = one(ids), other(ids)
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize(
    ("attention", "calls", "conditions"),
    [
        (ways.Window, ways.once, ["x.size(1) > 8"]),
        (ways.SingleSequence, ways.once, ["x.size(0) == 1"]),
        (ways.BestKeys, ways.once, []),
        (ways.Masked, ways.with_mask, ["mask is None"]),
        (ways.Flagged, ways.twice_with_flags, ["base == 10000.0 and causal is False"]),
        (ways.Sized, ways.with_size, ["S == 1"]),
        (ways.Lazy, ways.once, []),
        (ways.Remembering, ways.once, []),
        (ways.Lowest, ways.once, []),
    ],
)
def test_half_of_the_features_at_any_size_are_the_model_with_the_others_at_zero(
    attention: type[nn.Module], calls: ways.Calls, conditions: list[str]
) -> None:
    model = decoder(attention, calls)
    found = surveyed(model).modules()
    assert [condition for one in found for condition, _ in one.forks] == conditions
    assert sorted(placed.site.pattern for one in found for placed in one.placed) == ["query-key", "value-output"]
    small, zeroed = halved(model)
    assert sum(p.numel() for p in small.parameters()) < 0.85 * sum(p.numel() for p in model.parameters())
    for size in SIZES:
        ids = torch.randint(ways.VOCABULARY, size, generator=torch.Generator().manual_seed(1))
        assert largest_change(zeroed, small, ids) < TOLERANCE, size


def test_scores_keep_the_scale_of_the_whole_head_where_values_keep_their_size() -> None:
    model = decoder(ways.ScaledBySize)
    assert [placed.site.pattern for one in surveyed(model).modules() for placed in one.placed] == ["query-key"]
    small, zeroed = halved(model)
    ids = torch.randint(ways.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    assert largest_change(zeroed, small, ids) < TOLERANCE


@pytest.mark.parametrize(
    ("attention", "calls", "reason"),
    [
        (ways.Counting, ways.twice, "it does not do the same each time that the model calls it"),
        (ways.LogScaled, ways.once, "what it does is traced for one size of its inputs only (ways.py:"),
        (ways.Looping, ways.once, "what it does is traced for one size of its inputs only (ways.py:"),
        (ways.KeysAreValues, ways.once, "refused: mix: every feature depends on the others"),
        (ways.Biased, ways.once, "`blocks.0.key.bias` is also read by `blocks.0` (ways.py:"),
    ],
)
def test_what_a_trace_cannot_tell_is_left_with_the_reason(
    attention: type[nn.Module], calls: ways.Calls, reason: str
) -> None:
    found = surveyed(decoder(attention, calls))
    refused = [site.reason for site in found.analysis.sites if site.decomposition is None]
    assert refused
    assert any(reason in said for said in refused), refused


def test_a_mask_that_torch_looks_at_is_taken_as_it_is() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ways.Encoder().eval().requires_grad_(False)
    proof = mg.verify(model, example_inputs=(torch.randint(ways.VOCABULARY, (2, 6)),))
    assert (proof.sites, proof.max_relative_error < TOLERANCE) == (3, True)


def test_a_model_that_keeps_what_it_computed_is_told_what_to_drop() -> None:
    model = ways.Decoder(ways.Attention)
    model.last = model.head(torch.zeros(1, ways.WIDTH))
    with pytest.raises(InputError, match="`last` is computed from parameters and kept, so the model cannot be copied"):
        surveyed(model)


def test_a_constant_that_was_not_traced_is_an_error_and_not_ignored() -> None:
    small, _ = halved(decoder(ways.Masked, ways.with_mask))
    with pytest.raises(ValueError, match="this module was compressed for start = 0"):
        small.blocks[0](torch.zeros(1, 1, ways.WIDTH), None, start=3)  # type: ignore[index,operator]


def test_a_limit_of_the_dtype_is_that_of_the_dtype_the_model_runs_in() -> None:
    small, zeroed = (one.to(torch.float16) for one in halved(decoder(ways.Lowest)))
    ids = torch.randint(ways.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    assert small(ids).isfinite().all()
    assert largest_change(zeroed, small, ids) < 1e-2  # float16


def test_nothing_that_a_model_or_its_code_remembers_is_changed_by_an_analysis() -> None:
    ways.remembered_angles.cache_clear()
    model = decoder(ways.Lazy)
    before = dict(vars(model.blocks[0]))  # type: ignore[index]
    surveyed(model).modules()
    surveyed(decoder(ways.Remembering)).modules()
    assert dict(vars(model.blocks[0])) == before  # type: ignore[index]
    assert ways.remembered_angles.cache_info().currsize == 0
