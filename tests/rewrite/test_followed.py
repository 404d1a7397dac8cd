"""Where a norm follows a consumer, tokens count as it scales them: in sums, in choices and in errors."""

from typing import Any

import pytest
import torch
from fixtures.families import family
from fixtures.library import build
from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import ConsumerStatistics
from modegpt_graph.compression import Prepared, prepare
from modegpt_graph.models import resolve

LARGE = 1e4  # what consumers put out, for what a norm adds under its root not to tell


def tokens() -> Tensor:
    return torch.randint(0, 24, (16, 64), generator=torch.Generator().manual_seed(0))


def prepared(name: str, **options: Any) -> Prepared:
    model = build(name, "cpu")
    for path, module in model.named_modules():
        if path.endswith(("o_proj", "down_proj")):
            module.weight.data *= LARGE
    return prepare(resolve(model), calibration=tokens(), evaluating=False, other_text=False, **options)


def seen(model: nn.Module, path: str, run: Any) -> tuple[Tensor, Tensor]:
    """(T, N) what a linear module reads while something runs, and (T, D) what it puts out."""
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, output: found.extend([args[0], output]))
    with torch.no_grad():
        run()
    handle.remove()
    first, second = (one.flatten(0, -2).double() for one in found)
    return first, second


def consumer_of(prepared: Prepared, site: str) -> str:
    (own,) = (one for one in prepared.surveyed.survey.analysis.sites if one.id == site)
    return (own.roles.get("down") or own.roles["output"]).parameter.rpartition(".")[0]


@pytest.mark.parametrize(("name", "approximate"), [("gemma2", False), ("gemma3", True), ("olmo2", False)])
def test_sums_are_of_what_enters_the_stream(name: str, approximate: bool) -> None:
    found = prepared(name, approximate_norm=approximate)
    dense, checked = found.decomposed.dense, 0
    for site, statistics in found.decomposed.observed.statistics.items():
        if isinstance(statistics, ConsumerStatistics):
            rows, output = seen(dense, consumer_of(found, site), lambda: dense(tokens()))
            rows = rows / output.norm(dim=1, keepdim=True)
            gram, wanted = statistics.gram[:-1, :-1], rows.T @ rows
            torch.testing.assert_close(gram / gram.trace(), wanted / wanted.trace(), rtol=1e-3, atol=1e-6)
            checked += 1
    assert checked == found.decomposed.observed.followed == 2 * len(found.decomposed.layers)
    (said,) = (one for one in found.decomposed.said("curves", recalibrates=True) if "a norm follows, and" in one)
    assert f"At {checked} of {len(found.decomposed.items)} sites" in said


@pytest.mark.parametrize(("recalibrate", "preset"), [(True, "default"), (False, "default"), (True, "paper")])
def test_errors_are_of_what_enters_the_stream_where_sums_are(recalibrate: bool, preset: str) -> None:
    found = prepared("gemma2", recalibrate=recalibrate, preset=preset)
    result = found.at(0.4)
    dense, errors = found.decomposed.dense, result.report.outcome.sites  # type: ignore[union-attr]
    checked = 0
    for site in errors:
        if not site.id.endswith("gated-mlp") or site.relative_error is None:
            continue
        path, mlp = consumer_of(found, site.id), site.id.rpartition(":")[0]
        _, wanted = seen(dense, path, lambda: dense(tokens()))
        calls: list[Tensor] = []
        handle = dense.get_submodule(mlp).register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0]))
        dense(tokens())
        handle.remove()
        smaller = result.model.get_submodule(mlp)
        _, output = seen(result.model, path, lambda smaller=smaller, calls=calls: smaller(calls[0]))
        scale = 1 / wanted.norm(dim=1, keepdim=True) if found.decomposed.preset.weighs_tokens else 1
        error = ((output - wanted) * scale).square().sum() / (wanted * scale).square().sum()
        assert site.relative_error == pytest.approx(float(error), rel=1e-3)
        checked += 1
    assert checked


def test_tokens_count_alike_in_the_paper_and_where_no_norm_follows() -> None:
    for found in (prepared("gemma2", preset="paper"), prepare(resolve(family("llama")), calibration=tokens())):
        assert found.decomposed.observed.followed == 0
        assert not any("a norm follows, and" in one for one in found.decomposed.said("curves", recalibrates=True))
