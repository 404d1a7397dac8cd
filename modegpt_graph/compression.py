"""A model read, analysed, calibrated and decomposed once, from which a result at any ratio follows."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph import checkpoint
from modegpt_graph.calibrate.memory import Memory
from modegpt_graph.calibrate.observe import calibrate
from modegpt_graph.calibrate.store import Store, run_key
from modegpt_graph.calibrate.stream import followed_consumers
from modegpt_graph.calibrate.text import Calibration, held_out_windows, windows_line
from modegpt_graph.errors import InputError, ModegptError
from modegpt_graph.evaluate import compare
from modegpt_graph.match.decoder import decoder_layers
from modegpt_graph.match.prepare import Surveyed, read_patterns, survey_model
from modegpt_graph.match.sites import Analysis, Site, Unmatched
from modegpt_graph.models import ModelSource
from modegpt_graph.models.contents import Contents
from modegpt_graph.progress import Clock, NullProgress, Progress
from modegpt_graph.report.approximation import approximation_said
from modegpt_graph.report.measure import Built, measure
from modegpt_graph.report.outcome import CompressionOutcome, Search
from modegpt_graph.report.schema import to_json
from modegpt_graph.report.words import plural
from modegpt_graph.rewrite.apply import RewrittenModule
from modegpt_graph.rewrite.costs import BUDGETS, CONTEXT, count_costs
from modegpt_graph.rewrite.decomposed import Decomposed, decompose
from modegpt_graph.rewrite.looseness import observed_beside
from modegpt_graph.rewrite.presets import PRESETS, preset_named
from modegpt_graph.rewrite.ranks import ALLOCATORS
from modegpt_graph.rewrite.solution import Solution


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
class Prepared:
    """A model that is ready to be made smaller: `at` gives a result, at as many ratios as are wanted.

    text: what it was calibrated on.   held_out: windows of the same text for the evaluation, None for none.
    clock: seconds by stage that all ratios have in common.
    """

    source: ModelSource
    tokenizer: Any
    surveyed: Surveyed
    decomposed: Decomposed
    text: Calibration
    held_out: Tensor | None
    seed: int
    preset: str
    recalibrates: bool
    clock: Clock
    progress: Progress
    contents: Contents  # of the dense model, before anything was run through it

    def at(self, ratio: float, allocator: str | None = None, budget: str = "parameters") -> Result:
        """The model without `ratio` of what `budget` counts. allocator: the preset's own where None.

        Raises InputError for a ratio that the sites cannot give, and for an unknown allocator or budget.
        """
        check_request(ratio, allocator, self.preset, budget)
        allocator = self.allocator(allocator)
        return self.result(self.ranks(ratio, allocator, budget), ratio, allocator, budget)

    def ranks(self, ratio: float, allocator: str, budget: str = "parameters", **options: Any) -> dict[str, int]:
        """As `Decomposed.ranks`, for what this model goes through afterwards."""
        return self.decomposed.ranks(ratio, allocator, budget=budget, recalibrates=self.recalibrates, **options)

    def allocator(self, name: str | None) -> str:
        """The name given, or the preset's own; what the allocator measures once for all ratios is measured."""
        name = name or PRESETS[self.preset].allocator
        with self.clock("allocate"):
            if name == "curves":
                _ = self.decomposed.divergences
        return name

    def build(self, ranks: Mapping[str, int], clock: Clock) -> Built:
        """The model at these ranks."""
        decomposed, progress = self.decomposed, self.progress
        with clock("solve"), progress.stage("solve"):
            first = solutions = decomposed.solutions(ranks, recalibrates=self.recalibrates)
        with clock("rewrite"), progress.stage("rewrite"):
            self.contents.restore()
            smaller, rewritten = decomposed.model(solutions)
        contents, again = Contents(smaller), None
        if self.recalibrates:
            with clock("recalibrate"):
                solutions, again = decomposed.recalibrated(smaller, solutions)
        contents.restore()
        return Built(smaller, rewritten, first, solutions, again)

    def result(
        self,
        ranks: Mapping[str, int],
        ratio: float,
        allocator: str,
        budget: str,
        search: Search | None = None,
        built: Built | None = None,
    ) -> Result:
        """The model at these ranks, measured.

        ratio: what they come to of what `budget` counts, as asked or found.   built: the model, where there is one.
        """
        decomposed, dense = self.decomposed, self.decomposed.dense
        clock, progress = Clock(self.clock.seconds), self.progress
        built = built or self.build(ranks, clock)
        smaller, solutions = built.model, built.solutions
        contents = Contents(smaller)
        with clock("measure"):
            outcome = measure(
                decomposed,
                built,
                ranks,
                ratio=ratio,
                budget=budget,
                preset=self.preset,
                allocator=allocator,
                seed=self.seed,
                text=self.text,
            )
        if self.held_out is not None:
            with clock("evaluate"), progress.stage("evaluate"):
                found = compare(dense, smaller, self.held_out)
            spent = sum(clock.seconds.values()) - clock.seconds["evaluate"]
            forward_pass = found.dense_seconds * self.text.tokens.numel() / self.held_out.numel()
            outcome = replace(
                outcome,
                forward_passes=spent / forward_pass,
                perplexity_dense=found.dense_perplexity,
                perplexity_compressed=found.perplexity,
                kl=found.kl,
                evaluation=f"{windows_line(self.held_out)} held out of the calibration text",
            )
        if self.surveyed.approximate_norm:
            with clock("compare"), progress.stage("compare with exact norms"):
                said = self._approximation(ratio, allocator, budget, solutions, outcome.kl)
            outcome = replace(outcome, approximation=said)
        contents.restore()
        self.contents.restore()
        report = Report(
            self.surveyed.analysis,
            replace(
                outcome,
                seconds=clock.seconds,
                choices=(*decomposed.said(allocator, recalibrates=self.recalibrates), *built.said),
                search=search,
                reused=tuple(decomposed.memory.said),
            ),
        )
        return Result(smaller, report, self.source, built.rewritten, solutions, self.surveyed, self.tokenizer)

    def _approximation(
        self, ratio: float, allocator: str, budget: str, solutions: Mapping[str, Solution], kl: float | None
    ) -> str:
        """What approximated norms cost, against the same ratio from the other sites alone."""
        decomposed = self.decomposed
        nearly = {p.site.id for one in decomposed.modules for p in one.placed if p.site.is_approximated}
        done = [one for site, one in solutions.items() if site in nearly]
        without, reachable = None, True
        if done:
            try:
                ranks = self.ranks(ratio, allocator, budget, without=nearly)
            except InputError:
                reachable = False
            else:
                if self.held_out is not None:
                    without = compare(decomposed.dense, self.build(ranks, Clock()).model, self.held_out).kl
        return approximation_said(done, kl, without, reachable)


def check_request(ratio: float | None, allocator: str | None, preset: str, budget: str = "parameters") -> None:
    """Raise InputError for what no model could be given. ratio: None where it is to be found."""
    preset_named(preset)
    if budget not in BUDGETS:
        raise InputError(f"unknown budget {budget!r}; known: {', '.join(BUDGETS)}")
    if ratio is not None and not 0 < ratio <= 0.95:
        raise InputError(f"ratio {ratio:g} is outside (0, 0.95]; 0.3 removes 30 % of {BUDGETS[budget]}")
    if allocator is not None and allocator not in ALLOCATORS:
        raise InputError(f"unknown allocator {allocator!r}; known: {', '.join(ALLOCATORS)}")


def prepare(
    source: ModelSource,
    *,
    calibration: str | Path | Tensor,
    windows: int = 32,
    window: int = 1024,
    evaluating: bool = True,
    of_tokens: bool = False,
    seed: int = 0,
    patterns: Iterable[str | Path] | None = None,
    dtype: str = "float32",
    approximate_norm: bool = False,
    preset: str = "default",
    recalibrate: bool | None = None,
    other_text: bool = True,
    context: int = CONTEXT,
    cache: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Read, analyse, calibrate and decompose a model.

    windows, window: of calibration text.   evaluating: whether windows of it are held out.   of_tokens: whether some
    are held out of token ids too.   context: tokens that a token attends to where multiply-adds are counted.
    recalibrate: whether results are recalibrated; as the preset has it where None.   other_text: whether it is also
    calibrated on general text, where the preset has that.   cache: whether what calibration finds is taken from an
    earlier run, and kept for later ones.   Raises as `compress`.
    """
    progress, clock, chosen = progress or NullProgress(), Clock(), preset_named(preset)
    with clock("load"), progress.stage("load the model"):
        dense, tokenizer = source.load(getattr(torch, dtype)), source.tokenizer()
        contents = Contents(dense)
    with clock("tokens"), progress.stage("read the calibration text"):
        text, held_out = held_out_windows(
            calibration,
            tokenizer,
            windows=windows,
            window=window,
            seed=seed,
            model=dense,
            evaluating=evaluating,
            of_tokens=of_tokens,
        )
    if text.fallback_reason:
        progress.note(f"calibrating on text that the model samples itself: {text.fallback_reason}")
    with clock("analyze"):
        surveyed = survey_model(source, read_patterns(patterns), progress, approximate_norm=approximate_norm)
        modules, layers = surveyed.modules(), decoder_layers(surveyed.trace)
    for reason, count in Counter(surveyed.left.values()).items():
        progress.note(f"{plural(count, 'site')} left: {reason}")
    if not modules:
        raise ModegptError(f"{source.name}: no site can be made smaller; `analyze` says why")
    sites = [placed.site.id for one in modules for placed in one.placed]
    if other_text:
        with clock("tokens"):
            text = text.with_other(dense, chosen.other_share, seed, progress)
    with clock("calibrate"):
        memory = Memory()
        if cache:
            told = (sites, chosen.value_inputs, chosen.weighs_tokens, approximate_norm, dtype)
            memory = Memory(Store.default(), run_key(dense, str(surveyed.trace.graph), text.parts, *told))
        followed = followed_consumers(dense, modules, layers, text.tokens) if chosen.weighs_tokens else {}
        run = partial(
            calibrate,
            dense,
            modules,
            layers,
            progress=progress,
            value_inputs=chosen.value_inputs,
            followed=followed,
        )
        observed = memory.calibrated(sites, lambda: observed_beside(run(text.tokens), text.other, modules, run))
    total = surveyed.survey.analysis.model.decoder_linear_parameters
    with clock("decompose"):
        costs = count_costs(dense, modules, surveyed.trace, total, context)
        decomposed = decompose(
            dense,
            surveyed,
            modules,
            layers,
            observed,
            text.parts,
            costs,
            preset=chosen,
            memory=memory,
            progress=progress,
        )
    again = chosen.recalibrates if recalibrate is None else recalibrate
    return Prepared(
        source, tokenizer, surveyed, decomposed, text, held_out, seed, preset, again, clock, progress, contents
    )
