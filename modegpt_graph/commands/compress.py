"""`compress`: a smaller model in a folder."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from modegpt_graph.commands import checks, options
from modegpt_graph.commands.runtime import messages, quieten, results, write_json

GOAL, METHOD = "How much", "Method"


class Allocator(StrEnum):
    """How the ratio is spread over the sites."""

    curves = "curves"
    block_influence = "block-influence"
    split_influence = "split-influence"
    owl = "owl"
    uniform = "uniform"


class Preset(StrEnum):
    """Which algorithms decompose the sites."""

    default = "default"
    paper = "paper"


class Budget(StrEnum):
    """What a ratio is a share of."""

    parameters = "parameters"
    bytes = "bytes"
    multiply_adds = "multiply-adds"
    kv_cache = "kv-cache"


class Dtype(StrEnum):
    """Number format the model is run and saved in; decompositions are float64 in any case."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def compress(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the smaller model.")],
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio",
            metavar="R",
            rich_help_panel=GOAL,
            help="Share to remove, up to 0.95, of what --budget counts.",
            show_default=False,
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        str | None,
        typer.Option(
            "--max-perplexity-increase",
            metavar="SHARE",
            rich_help_panel=GOAL,
            help="Find the largest ratio that costs at most so much perplexity on held-out text: 10%.",
            show_default=False,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            "--target-size",
            metavar="BYTES",
            rich_help_panel=GOAL,
            help="Find the smallest ratio whose saved weights have at most so many bytes: 100MB.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        Budget,
        typer.Option(
            "--budget",
            metavar="NAME",
            rich_help_panel=GOAL,
            help="What the ratio is a share of: parameters (of the decoder layers' matrices), bytes (of the stored "
            "weights), multiply-adds (of one token) or kv-cache (bytes of one token).",
        ),
    ] = Budget.parameters,
    context: Annotated[
        int,
        typer.Option(
            "--context",
            metavar="N",
            rich_help_panel=GOAL,
            help="Tokens that a token attends to where multiply-adds are counted.",
        ),
    ] = 2048,
    calibration: options.CalibrationText = "wikitext2",
    windows: options.CalibrationWindows = 32,
    window: options.CalibrationWindow = 1024,
    preset: Annotated[
        Preset,
        typer.Option(
            "--preset",
            metavar="NAME",
            rich_help_panel=METHOD,
            help="default, or paper: MoDeGPT's three algorithms, scores and allocation to the letter.",
        ),
    ] = Preset.default,
    allocator: Annotated[
        Allocator | None,
        typer.Option(
            "--allocator",
            metavar="NAME",
            rich_help_panel=METHOD,
            help="How the ratio is spread over the sites: curves (measured errors, weighed by what they do to the "
            "logits), block-influence (of layers), split-influence (of attention and MLP apart), owl (outliers) or "
            "uniform.",
            show_default="curves; block-influence with --preset paper",
        ),
    ] = None,
    recalibrate: Annotated[
        bool | None,
        typer.Option(
            "--recalibrate/--no-recalibrate",
            rich_help_panel=METHOD,
            help="Fit the smaller model's layers again, one after the other, on what each really reads: better, for "
            "about twice the time.",
            show_default="recalibrate; not with --preset paper",
        ),
    ] = None,
    other_text: Annotated[
        bool,
        typer.Option(
            "--other-text/--no-other-text",
            rich_help_panel=options.CALIBRATION,
            help="Also calibrate on general text that comes with the tool, half as much as of --calib, so that "
            "other texts suffer less. With no tokenizer, the model samples a little instead. Not with --preset paper.",
        ),
    ] = True,
    dtype: Annotated[
        Dtype,
        typer.Option(
            "--dtype",
            metavar="NAME",
            rich_help_panel=METHOD,
            help="Number format to run and save in: float32, bfloat16 or float16. Decompositions are float64.",
        ),
    ] = Dtype.float32,
    seed: options.Seed = 0,
    patterns: options.Patterns = None,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            rich_help_panel=options.CALIBRATION,
            help="Neither use what calibration found in an earlier run nor keep it for the next.",
        ),
    ] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure perplexity and KL afterwards.")] = False,
    json_file: options.JsonFile = None,
    html_file: options.HtmlFile = None,
    approximate_norm: options.ApproximateNorm = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Make a model smaller, without training, and save it. The report is in DIR/report.json.

    [bold]Examples[/bold]

    modegpt-graph compress demo --ratio 0.3 --out small

    modegpt-graph compress ./my-model --ratio 0.2 --calib texts.jsonl --out ./my-model-small

    modegpt-graph compress demo --max-perplexity-increase 10% --out small

    modegpt-graph compress demo --target-size 400MB --out small
    """
    checks.one_goal(ratio=ratio, max_perplexity_increase=max_perplexity_increase, target_size=target_size)
    if ratio is not None:
        checks.ratio(ratio)
    checks.at_least("--context", context, 1)
    checks.out_directory(out)
    checks.text_source("--calib", calibration)
    checks.at_least("--calib-windows", windows, 1)
    checks.at_least("--calib-window", window, 2)
    checks.out_file("--json", json_file)
    checks.out_file("--html", html_file)
    checks.pattern_sources(patterns or [])
    quieten()
    from modegpt_graph import api
    from modegpt_graph.goals import share_of
    from modegpt_graph.report.console import render_outcome
    from modegpt_graph.report.files import write_text
    from modegpt_graph.report.html import to_html
    from modegpt_graph.report.progress import ConsoleProgress
    from modegpt_graph.report.schema import to_json

    with ConsoleProgress(messages()) as progress:
        result = api.compress(
            model,
            ratio,
            max_perplexity_increase=None if max_perplexity_increase is None else share_of(max_perplexity_increase),
            target_size=target_size,
            budget=budget.value,
            context=context,
            cache=not no_cache,
            calibration=calibration,
            preset=preset.value,
            recalibrate=recalibrate,
            other_text=other_text,
            allocator=None if allocator is None else allocator.value,
            seed=seed,
            patterns=patterns or None,
            calibration_windows=windows,
            calibration_window=window,
            evaluate=not no_eval,
            dtype=dtype.value,
            approximate_norm=approximate_norm,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        with progress.stage("save"):
            out.absolute().parent.mkdir(parents=True, exist_ok=True)
            result.save(out)
    report = result.report
    write_json(json_file, to_json(report.analysis, report.outcome))
    if html_file is not None:
        write_text(html_file, to_html(report.analysis, report.outcome))
    console = results(json_file)
    assert report.outcome is not None
    render_outcome(report.analysis, report.outcome, console)
    console.print()
    reasons = f"modegpt-graph explain {shlex.quote(str(out))}"
    console.print(f"Saved in {out}. The reasons, layer by layer: {reasons}", markup=False, soft_wrap=True)
