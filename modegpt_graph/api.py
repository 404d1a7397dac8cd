"""The façade: analyse, compress, load, verify and evaluate a model, given by name or as a module in memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph import checkpoint
from modegpt_graph.calibrate.observe import calibrate
from modegpt_graph.calibrate.text import check_source, evaluation_windows, held_out_windows, windows_line
from modegpt_graph.checkpoint.program import FORMATS, Program, export_program
from modegpt_graph.compression import Report, Result, check_request, prepare
from modegpt_graph.errors import InputError
from modegpt_graph.evaluate import ThroughputComparison, check_decodes, compare_throughput, perplexity, random_prompt
from modegpt_graph.evaluate.proof import Proof, prove
from modegpt_graph.evaluate.task_files import read_task
from modegpt_graph.evaluate.tasks import Accuracy, accuracies
from modegpt_graph.goals import bytes_of, checked_increase, within_perplexity, within_size
from modegpt_graph.match.decoder import decoder_layers
from modegpt_graph.match.meeting import Meeting, meet
from modegpt_graph.match.pattern_file import load_pattern
from modegpt_graph.match.prepare import read_patterns, survey_model
from modegpt_graph.methods.common import Setting
from modegpt_graph.methods.matrices import matrix_sizes
from modegpt_graph.methods.modular import needs_value_inputs
from modegpt_graph.methods.names import METHODS
from modegpt_graph.methods.race import race
from modegpt_graph.models import ModelSource, resolve, vocabulary_of
from modegpt_graph.progress import Clock, NullProgress, Progress
from modegpt_graph.report.compare import Comparison
from modegpt_graph.rewrite.costs import CONTEXT

Model = str | Path | nn.Module


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of a model on a text, None where there was no text; and its accuracy on every task."""

    perplexity: float | None = None
    windows: int | None = None
    window: int | None = None
    text: str | None = None
    tasks: tuple[Accuracy, ...] = ()


def analyze(
    model: Model,
    patterns: Iterable[str | Path] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    approximate_norm: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Find every pair of matrices that can be made smaller together. No weights are read.

    A site has a decomposition here exactly where `compress` can make it smaller: its module is traced on its own and
    its smaller form written, as `compress` does.
    patterns: further pattern files or folders, tried before the built-in ones.   approximate_norm: whether queries and
    keys under a norm of each head are taken too, by an approximation whose error is measured.
    Raises InputError where there is no such model.
    """
    source = _original(model, example_inputs, trust_remote_code)
    progress = progress or NullProgress()
    surveyed = survey_model(source, read_patterns(patterns), progress, approximate_norm=approximate_norm)
    with progress.stage("trace the modules"):
        return Report(surveyed.analysis)


def check_pattern(
    file: str | Path,
    model: Model,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Meeting:
    """What one pattern file meets in a model, and how near it came elsewhere. No weights are read.

    Raises InputError for a pattern file that is not sound.
    """
    pattern = load_pattern(Path(file))
    return meet(_original(model, example_inputs, trust_remote_code), pattern, progress)


@torch.no_grad()
def compress(
    model: Model,
    ratio: float | None = None,
    *,
    max_perplexity_increase: float | None = None,
    target_size: int | str | None = None,
    budget: str = "parameters",
    calibration: str | Path | Tensor = "wikitext2",
    preset: str = "default",
    recalibrate: bool | None = None,
    other_text: bool = True,
    allocator: str | None = None,
    seed: int = 0,
    patterns: Iterable[str | Path] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    calibration_windows: int = 32,
    calibration_window: int = 1024,
    evaluate: bool = True,
    dtype: str = "float32",
    approximate_norm: bool = False,
    context: int = CONTEXT,
    cache: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Make a model smaller. The model given is left as it was. Exactly one of three says by how much:

    ratio: the share of what `budget` counts that goes.   max_perplexity_increase: the largest ratio is found at which
    perplexity on held-out windows is at most so much higher, 0.1 for 10 %.   target_size: bytes of the saved weights
    (1_000_000, "100MB", powers of 1000) that are not exceeded.
    budget: `parameters` (of the decoder layers' matrices), `bytes` (of the stored weights), `multiply-adds` (of a token
    that attends to `context` tokens) or `kv-cache` (bytes of a token).
    calibration: a text file, a data set's name, `self`, or token ids (windows, window).
    approximate_norm: whether queries and keys under a norm of each head are made smaller too, by an approximation; the
    report says what it cost and whether it paid.
    preset: `default`, or `paper` for MoDeGPT's algorithms to the letter.   allocator: the preset's own where None.
    recalibrate: whether the smaller model's layers are fitted again one after the other, on what each really reads,
    which costs about three more passes over the calibration text, for each ratio that a search tries; as the preset
    has it where None.
    other_text: whether general text that comes with the tool is calibrated on too, half as much as is given, so that
    other texts suffer less; where there is no tokenizer, the model samples a little. Not with `paper`.
    cache: whether what calibration found in an earlier run of the same model, text and code is used again, and long
    work is kept for later runs.
    Raises InputError for a ratio outside (0, 0.95] or that the sites cannot give, a goal that cannot be met, unknown
    models, missing text.
    """
    if [ratio, max_perplexity_increase, target_size].count(None) != 2:
        raise InputError("give exactly one of ratio, max_perplexity_increase and target_size")
    check_request(ratio, allocator, preset, budget)
    size = None if target_size is None else bytes_of(target_size)
    increase = None if max_perplexity_increase is None else checked_increase(max_perplexity_increase)
    check_source(calibration)
    patterns = tuple(patterns or ())
    read_patterns(patterns)  # what is wrong in one is said before a model is loaded
    prepared = prepare(
        _original(model, example_inputs, trust_remote_code),
        calibration=calibration,
        windows=calibration_windows,
        window=calibration_window,
        evaluating=evaluate or increase is not None,
        of_tokens=increase is not None,
        seed=seed,
        patterns=patterns,
        dtype=dtype,
        approximate_norm=approximate_norm,
        preset=preset,
        recalibrate=recalibrate,
        other_text=other_text,
        context=context,
        cache=cache,
        progress=progress,
    )
    if increase is not None:
        return within_perplexity(prepared, increase, allocator, budget)
    if size is not None:
        return within_size(prepared, size, allocator, budget)
    assert ratio is not None
    return prepared.at(ratio, allocator, budget)


def load(directory: str | Path, factory: Any = None, *, trust_remote_code: bool = False) -> nn.Module:
    """The model that `Result.save` wrote, rebuilt from its plan; no code from the folder is run.

    factory: for modules that are not from transformers, the function that builds the original one, or `FILE.py:NAME`.
    """
    return checkpoint.load(Path(directory), factory, trust_remote_code=trust_remote_code)


@torch.no_grad()
def verify(
    model: Model,
    seed: int = 0,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    approximate_norm: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Proof:
    """Rewrite every site at full rank in shuffled order and compare logits and greedy generation.

    Real weights where there are some; random ones, at most two layers deep, for a bare configuration.
    """
    progress = progress or NullProgress()
    source = _original(model, example_inputs, trust_remote_code)
    with progress.stage("load the model"):
        original = source.load() if source.has_weights else source.random(seed, 2)
    inner = resolve(original, example_inputs=source.example_inputs)
    surveyed = survey_model(inner, read_patterns(), progress, approximate_norm=approximate_norm)
    return prove(original, surveyed.modules(), seed, source.example_inputs, progress)


def evaluate(
    model_or_dir: Model,
    text: str | Path | Tensor | None = None,
    window: int = 2048,
    windows: int | None = None,
    *,
    tasks: Iterable[str | Path] = (),
    questions: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model or of a compressed folder: the whole text tokenised once, in non-overlapping windows.

    tasks: .jsonl files of questions with several answers, for zero-shot accuracy.   questions: only the first of each.
    Raises InputError where there is neither text nor task, or one cannot be read.
    """
    asked = tuple(read_task(file, questions) for file in tasks)
    if text is None and not asked:
        raise InputError("nothing to evaluate on: give a text, tasks, or both")
    if text is not None:
        check_source(text)
    progress = progress or NullProgress()
    with progress.stage("load the model"):
        if not isinstance(model_or_dir, nn.Module) and checkpoint.is_compressed(Path(model_or_dir)):
            model = load(model_or_dir, trust_remote_code=trust_remote_code)
            tokenizer = resolve(Path(model_or_dir)).tokenizer()
        else:
            source = resolve(model_or_dir, trust_remote_code=trust_remote_code)
            model, tokenizer = source.load(), source.tokenizer()
    measured = Evaluation()
    if text is not None:
        tokens = evaluation_windows(text, tokenizer, window, windows)
        with progress.stage("evaluate"):
            measured = Evaluation(perplexity(model, tokens), tokens.shape[0], tokens.shape[1], _name_of(text))
    return replace(measured, tasks=accuracies(model, tokenizer, asked, progress)) if asked else measured


def export(
    directory: str | Path,
    to: str,
    out: str | Path,
    factory: Any = None,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Program:
    """Write a compressed folder in another format, once what was written gives the model's logits.

    to: `torch-export`, one file that `torch.export.load` reads: token ids of any batch and length to logits, without a
    cache.   out: a new file.   factory: as for `load`.
    Raises InputError for an unknown format, a file that is there, a folder that holds no compressed model.
    """
    if to not in FORMATS:
        raise InputError(f"unknown format {to!r}; known: {', '.join(FORMATS)}")
    progress = progress or NullProgress()
    with progress.stage("load the model"):
        model = _compressed(directory, factory, trust_remote_code=trust_remote_code)
    with progress.stage("export and check"):
        return export_program(model, Path(out))


def bench(
    directory: str | Path,
    against: Model,
    *,
    prompt: int = 512,
    new_tokens: int = 64,
    rounds: int = 5,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ThroughputComparison:
    """Tokens per second of a compressed folder and of the model it was made from, measured in turns.

    prompt: tokens that are read in one pass.   new_tokens: written after it, one at a time, with the cache.
    Raises InputError for a folder that holds no compressed model, and for models without `generate`.
    """
    progress = progress or NullProgress()
    with progress.stage("load the models"):
        smaller = _compressed(directory, trust_remote_code=trust_remote_code)
        dense = _original(against, None, trust_remote_code).load()
    check_decodes(dense)
    tokens = random_prompt(vocabulary_of(dense), length=prompt, seed=seed)
    with progress.stage("measure", rounds) as stage:
        return compare_throughput(dense, smaller, tokens, new_tokens, rounds, stage.advance)


@torch.no_grad()
def compare_methods(
    model: Model,
    methods: Sequence[str],
    ratios: Sequence[float],
    *,
    calibration: str | Path | Tensor = "wikitext2",
    text: str | Path | Tensor | None = None,
    window: int = 2048,
    windows: int | None = None,
    seed: int = 0,
    example_inputs: tuple[Any, ...] | None = None,
    calibration_windows: int = 32,
    calibration_window: int = 1024,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Perplexity of every method at every ratio: one calibration, one evaluation, one count of parameters.

    text: what is measured on, as for `evaluate`; windows held out of the calibration text where None.
    A method that needs what this model lacks has a reason in place of its figure. Raises InputError as `compress`.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise InputError(f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")
    check_source(calibration)
    if text is not None:
        check_source(text)
    progress, clock = progress or NullProgress(), Clock()
    source = _original(model, example_inputs, trust_remote_code)
    with clock("load"), progress.stage("load the model"):
        dense, tokenizer = source.load(), source.tokenizer()
    with clock("tokens"), progress.stage("read the texts"):
        read, held_out = held_out_windows(
            calibration,
            tokenizer,
            windows=calibration_windows,
            window=calibration_window,
            seed=seed,
            model=dense,
            evaluating=text is None,
        )
        tokens = held_out if text is None else evaluation_windows(text, tokenizer, window, windows)
    if tokens is None:
        raise InputError("nothing to measure perplexity on: give token ids or a text (--text) of its own")
    if read.fallback_reason:
        progress.note(f"calibrating on text that the model samples itself: {read.fallback_reason}")
    with clock("analyze"):
        surveyed = survey_model(source, read_patterns(), progress)
        modules, layers = surveyed.modules(), decoder_layers(surveyed.trace)
    with clock("calibrate"):
        value_inputs = needs_value_inputs(methods)
        observed = calibrate(dense, modules, layers, read.tokens, progress, value_inputs=value_inputs)
    with clock("dense"), progress.stage("measure the dense model"):
        dense_perplexity = perplexity(dense, tokens)
    sizes = matrix_sizes(surveyed.trace)
    setting = Setting(dense, surveyed, modules, layers, sizes, read, observed, seed, progress)
    entries = race(setting, methods, ratios, lambda smaller: perplexity(smaller, tokens))
    name = "the calibration text, held out of it" if text is None else _name_of(text)
    return Comparison(
        model=surveyed.survey.analysis.model,
        calibration=read.description,
        evaluation=f"{windows_line(tokens)} of {name}",
        seed=seed,
        perplexity_dense=dense_perplexity,
        entries=entries,
        fallback_reason=read.fallback_reason,
        seconds=clock.seconds,
    )


def _compressed(directory: str | Path, factory: Any = None, *, trust_remote_code: bool) -> nn.Module:
    """The model of a folder that `compress` wrote. Raises InputError where it is none."""
    if not checkpoint.is_compressed(Path(directory)):
        raise InputError(f"{directory} holds no compressed model; name a folder that `compress` wrote")
    return load(directory, factory, trust_remote_code=trust_remote_code)


def _name_of(text: str | Path | Tensor) -> str:
    return "token ids" if isinstance(text, Tensor) else str(text)


def _original(model: Model, example_inputs: tuple[Any, ...] | None, trust_remote_code: bool) -> ModelSource:
    """Where a model comes from. Raises InputError for a folder that holds a compressed one."""
    if not isinstance(model, nn.Module) and checkpoint.is_compressed(Path(model)):
        raise InputError(f"{model} is a compressed model already; give the original one (`explain` shows its report)")
    return resolve(model, trust_remote_code=trust_remote_code, example_inputs=example_inputs)
