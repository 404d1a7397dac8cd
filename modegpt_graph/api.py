"""The façade: analyse, compress, load, verify and evaluate a model, given by name or as a module in memory."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph import checkpoint
from modegpt_graph.allocate.budget import Item
from modegpt_graph.calibrate.observe import Calibrated, calibrate
from modegpt_graph.calibrate.text import Calibration, calibration_windows, evaluation_windows
from modegpt_graph.errors import InputError, ModegptError
from modegpt_graph.evaluate import compare, perplexity
from modegpt_graph.match.decoder import decoder_layers
from modegpt_graph.match.meeting import Meeting, meet
from modegpt_graph.match.modules import SiteModule
from modegpt_graph.match.pattern_file import load_pattern
from modegpt_graph.match.prepare import Surveyed, read_patterns, survey_model
from modegpt_graph.match.sites import Analysis, Site, Unmatched
from modegpt_graph.methods.common import Setting
from modegpt_graph.methods.matrices import matrix_sizes
from modegpt_graph.methods.names import METHODS
from modegpt_graph.methods.race import race
from modegpt_graph.models import ModelSource, can_generate, forward_logits, resolve
from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.report.approximation import approximation_said
from modegpt_graph.report.compare import Comparison
from modegpt_graph.report.measure import measure
from modegpt_graph.report.outcome import CompressionOutcome
from modegpt_graph.report.schema import to_json
from modegpt_graph.rewrite.apply import RewrittenModule, rewrite
from modegpt_graph.rewrite.budget import site_items
from modegpt_graph.rewrite.ranks import ALLOCATORS, curve_ranks, layer_ranks, site_weights
from modegpt_graph.rewrite.solution import Solution, shuffled
from modegpt_graph.rewrite.solve import Recipe, Solver, solver

Model = str | Path | nn.Module
HELD_OUT = 8  # windows of calibration text, at most, that are kept for the evaluation


@dataclass(frozen=True)
class Report:
    """What was found in a model, and what a compression made of it."""

    analysis: Analysis
    outcome: CompressionOutcome | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in model order."""
        return self.analysis.sites

    @property
    def unmatched(self) -> tuple[Unmatched, ...]:
        """The decoder-layer matrices that belong to no site."""
        return self.analysis.unmatched

    @property
    def coverage(self) -> float:
        """Share of decoder-layer linear parameters that belong to a site."""
        return self.analysis.coverage

    def to_json(self) -> dict[str, Any]:
        """The JSON contract, as Python values."""
        return to_json(self.analysis, self.outcome)


@dataclass
class Result:
    """A compressed model and its report."""

    model: nn.Module
    report: Report
    _source: ModelSource = field(repr=False)
    _rewritten: tuple[RewrittenModule, ...] = field(repr=False)
    _solutions: Mapping[str, Solution] = field(repr=False)
    _surveyed: Surveyed = field(repr=False)
    _tokenizer: Any = field(default=None, repr=False)

    def save(self, directory: str | Path) -> None:
        """Write the model as a folder that `load` and the transformers library read.

        Raises InputError where the folder exists and is not empty.
        """
        checkpoint.save(
            Path(directory),
            self.model,
            self._rewritten,
            self._solutions,
            self._surveyed.patterns,
            self._source,
            self._tokenizer,
            self.report.to_json(),
            approximate_norm=self._surveyed.approximate_norm,
        )


@dataclass(frozen=True)
class Proof:
    """A rewrite of every site at full rank, in shuffled order.

    max_relative_error: largest change of a logit over the largest logit.   generation_identical: whether greedy
    generation gave the same tokens.   sites: how many were rewritten.
    """

    max_relative_error: float
    generation_identical: bool
    sites: int


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of a model on a text."""

    perplexity: float
    windows: int
    window: int
    text: str


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

    patterns: further pattern files or folders, tried before the built-in ones.   approximate_norm: whether queries and
    keys under a norm of each head are taken too, by an approximation whose error is measured.
    Raises InputError where there is no such model.
    """
    source = _original(model, example_inputs, trust_remote_code)
    surveyed = survey_model(source, read_patterns(patterns), progress, approximate_norm=approximate_norm)
    return Report(surveyed.survey.analysis)


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


def compress(
    model: Model,
    ratio: float,
    *,
    calibration: str | Path | Tensor = "wikitext2",
    allocator: str = "curves",
    seed: int = 0,
    patterns: Iterable[str | Path] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    calibration_windows: int = 32,
    calibration_window: int = 1024,
    evaluate: bool = True,
    dtype: str = "float32",
    approximate_norm: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Remove `ratio` of the decoder-layer linear parameters. The model given is left as it was.

    approximate_norm: whether queries and keys under a norm of each head are made smaller too, by an approximation; the
    report says what it cost and whether it paid.

    calibration: a text file, a data set's name, `self`, or token ids (windows, window).
    Raises InputError for a ratio outside (0, 0.95] or that the sites cannot give, unknown models, missing text.
    """
    if not 0 < ratio <= 0.95:
        raise InputError(f"ratio {ratio:g} is outside (0, 0.95]; 0.3 removes 30 % of the decoder's linear parameters")
    if allocator not in ALLOCATORS:
        raise InputError(f"unknown allocator {allocator!r}; known: {', '.join(ALLOCATORS)}")
    progress, clock = progress or NullProgress(), _Clock()
    source = _original(model, example_inputs, trust_remote_code)
    with clock("load"), progress.stage("load the model"):
        dense, tokenizer = source.load(getattr(torch, dtype)), source.tokenizer()
    with clock("tokens"), progress.stage("read the calibration text"):
        text, held_out = _texts(calibration, tokenizer, dense, calibration_windows, calibration_window, seed, evaluate)
    if text.fallback_reason:
        progress.note(f"calibrating on text that the model samples itself: {text.fallback_reason}")
    with clock("analyze"):
        surveyed = survey_model(source, read_patterns(patterns), progress, approximate_norm=approximate_norm)
        modules = surveyed.modules()
    if not modules:
        raise ModegptError(f"{source.name}: no site can be made smaller; `analyze` says why")
    with clock("calibrate"):
        layers = decoder_layers(surveyed.trace)
        observed = calibrate(dense, modules, layers, text.tokens, progress)
    with clock("decompose"):
        solvers = _solvers(dense, modules, observed, progress)
    items, linear = site_items(modules), surveyed.survey.analysis.model.decoder_linear_parameters
    with clock("allocate"):
        weights = None
        if allocator == "curves":
            weights = site_weights(dense, modules, layers, items, solvers, text.tokens, progress)

    def solve(chosen: Sequence[Item]) -> dict[str, Solution]:
        """Solutions of the chosen sites that are made smaller."""
        if weights is not None:
            ranks = curve_ranks(chosen, solvers, weights, linear, ratio)
        else:
            ranks = layer_ranks(allocator, chosen, observed.importance, linear, ratio)
        return {one.id: solvers[one.id].solution(ranks[one.id]) for one in chosen if ranks[one.id] < one.full_rank}

    with clock("solve"), progress.stage("solve"):
        solutions = solve(items)
    with clock("rewrite"), progress.stage("rewrite"):
        smaller = copy.deepcopy(dense)
        rewritten = rewrite(smaller, modules, solutions)
    outcome = measure(
        dense, smaller, modules, solutions, linear, ratio=ratio, allocator=allocator, seed=seed, text=text
    )
    if held_out is not None:
        with clock("evaluate"), progress.stage("evaluate"):
            found = compare(dense, smaller, held_out)
        outcome = replace(
            outcome,
            perplexity_dense=found.dense_perplexity,
            perplexity_compressed=found.perplexity,
            kl=found.kl,
            evaluation=f"{held_out.shape[0]} windows of {held_out.shape[1]:,} tokens held out of the calibration text",
        )
    if approximate_norm:
        with clock("compare"), progress.stage("compare with exact norms"):
            said = _approximation(dense, modules, items, solutions, solve, held_out, outcome.kl)
        outcome = replace(outcome, approximation=said)
    outcome = replace(outcome, seconds=clock.seconds)
    report = Report(surveyed.survey.analysis, outcome)
    return Result(smaller, report, source, rewritten, solutions, surveyed, tokenizer)


def _approximation(
    dense: nn.Module,
    modules: tuple[SiteModule, ...],
    items: Sequence[Item],
    solutions: Mapping[str, Solution],
    solve: Callable[[Sequence[Item]], dict[str, Solution]],
    held_out: Tensor | None,
    kl: float | None,
) -> str:
    """What approximated norms cost, against the same ratio from the other sites alone."""
    nearly = {placed.site.id for one in modules for placed in one.placed if placed.site.is_approximated}
    done = [one for site, one in solutions.items() if site in nearly]
    without, reachable = None, True
    if done:
        try:
            others = solve([item for item in items if item.id not in nearly])
        except InputError:
            reachable = False
        else:
            if held_out is not None:
                other = copy.deepcopy(dense)
                rewrite(other, modules, others)
                without = compare(dense, other, held_out).kl
    return approximation_said(done, kl, without, reachable)


def load(directory: str | Path, factory: Any = None, *, trust_remote_code: bool = False) -> nn.Module:
    """The model that `Result.save` wrote, rebuilt from its plan; no code from the folder is run.

    factory: for modules that are not from transformers, the function that builds the original one, or `FILE.py:NAME`.
    """
    return checkpoint.load(Path(directory), factory, trust_remote_code=trust_remote_code)


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
    modules = surveyed.modules()
    generator = torch.Generator().manual_seed(seed)
    solutions = {p.site.id: shuffled(p.footprint.layout, generator) for one in modules for p in one.placed}
    with progress.stage("rewrite"):
        changed = copy.deepcopy(original)
        rewrite(changed, modules, solutions)
    with progress.stage("compare"):
        tokens = _random_tokens(original, source.example_inputs, generator)
        with torch.no_grad():
            before, after = forward_logits(original, tokens), forward_logits(changed, tokens)
        error = float((before - after).abs().max() / before.abs().max())
        same = torch.equal(_greedy(original, tokens), _greedy(changed, tokens))
    return Proof(error, same, sum(len(p.site.apart()) for one in modules for p in one.placed))


def evaluate(
    model_or_dir: Model,
    text: str | Path | Tensor,
    window: int = 2048,
    windows: int | None = None,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model or of a compressed folder: the whole text tokenised once, in non-overlapping windows."""
    progress = progress or NullProgress()
    with progress.stage("load the model"):
        if not isinstance(model_or_dir, nn.Module) and checkpoint.is_compressed(Path(model_or_dir)):
            model = load(model_or_dir, trust_remote_code=trust_remote_code)
            tokenizer = resolve(Path(model_or_dir)).tokenizer()
        else:
            source = resolve(model_or_dir, trust_remote_code=trust_remote_code)
            model, tokenizer = source.load(), source.tokenizer()
    tokens = evaluation_windows(text, tokenizer, window, windows)
    with progress.stage("evaluate"):
        value = perplexity(model, tokens)
    return Evaluation(value, tokens.shape[0], tokens.shape[1], _name_of(text))


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
    progress, clock = progress or NullProgress(), _Clock()
    source = _original(model, example_inputs, trust_remote_code)
    with clock("load"), progress.stage("load the model"):
        dense, tokenizer = source.load(), source.tokenizer()
    with clock("tokens"), progress.stage("read the texts"):
        read, held_out = _texts(
            calibration, tokenizer, dense, calibration_windows, calibration_window, seed, text is None
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
        observed = calibrate(dense, modules, layers, read.tokens, progress)
    with clock("dense"), progress.stage("measure the dense model"):
        dense_perplexity = perplexity(dense, tokens)
    sizes = matrix_sizes(surveyed.trace)
    setting = Setting(dense, surveyed, modules, layers, sizes, read.tokens, observed, seed, progress)
    entries = race(setting, methods, ratios, lambda smaller: perplexity(smaller, tokens))
    name = "the calibration text, held out of it" if text is None else _name_of(text)
    return Comparison(
        model=surveyed.survey.analysis.model,
        calibration=read.description,
        evaluation=f"{tokens.shape[0]} windows of {tokens.shape[1]:,} tokens of {name}",
        seed=seed,
        perplexity_dense=dense_perplexity,
        entries=entries,
        fallback_reason=read.fallback_reason,
        seconds=clock.seconds,
    )


def _name_of(text: str | Path | Tensor) -> str:
    return "token ids" if isinstance(text, Tensor) else str(text)


def _original(model: Model, example_inputs: tuple[Any, ...] | None, trust_remote_code: bool) -> ModelSource:
    """Where a model comes from. Raises InputError for a folder that holds a compressed one."""
    if not isinstance(model, nn.Module) and checkpoint.is_compressed(Path(model)):
        raise InputError(f"{model} is a compressed model already; give the original one (`explain` shows its report)")
    return resolve(model, trust_remote_code=trust_remote_code, example_inputs=example_inputs)


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _texts(
    source: str | Path | Tensor,
    tokenizer: Any,
    model: nn.Module,
    windows: int,
    window: int,
    seed: int,
    evaluating: bool,
) -> tuple[Calibration, Tensor | None]:
    """Calibration text, and windows of the same text that are held out of it; token ids are all used."""
    extra = 0 if isinstance(source, Tensor) or not evaluating else max(1, min(HELD_OUT, windows // 4))
    text = calibration_windows(source, tokenizer, windows=windows + extra, window=window, seed=seed, model=model)
    count = min(extra, len(text.tokens) - 1)
    if count < 1:
        return text, None
    chosen = torch.zeros(len(text.tokens), dtype=torch.bool)
    chosen[torch.linspace(0, len(text.tokens) - 1, count).round().long()] = True
    description = f"{text.description}, {count} of them held out for the evaluation"
    return replace(text, tokens=text.tokens[~chosen], description=description), text.tokens[chosen]


def _solvers(
    model: nn.Module, modules: tuple[SiteModule, ...], observed: Calibrated, progress: Progress
) -> dict[str, Solver]:
    placed = [(one.path, placed) for one in modules for placed in one.placed]
    solvers = {}
    with progress.stage("decompose", len(placed)) as stage:
        for path, one in placed:
            module = model.get_submodule(path)
            solvers[one.site.id] = solver(one, module, observed.statistics[one.site.id], Recipe())
            stage.advance()
    return solvers


def _random_tokens(model: nn.Module, example_inputs: tuple[Any, ...] | None, generator: torch.Generator) -> Tensor:
    if example_inputs is not None:
        return example_inputs[0]
    vocabulary = next(part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding))
    return torch.randint(0, vocabulary, (2, 24), generator=generator)


def _greedy(model: Any, tokens: Tensor, count: int = 16) -> Tensor:
    """The next tokens by greedy generation, with the cache where the model has one; of logits alone where not."""
    with torch.no_grad():
        if can_generate(model):
            mask = torch.ones_like(tokens)
            return model.generate(
                tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        return forward_logits(model, tokens).argmax(-1)
