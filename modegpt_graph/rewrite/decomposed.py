"""A model decomposed once: every site's solver and weight, from which ranks and models at any ratio follow."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from modegpt_graph.allocate.budget import TOLERANCE, Item, Target, reachable_ratio, removed_cost
from modegpt_graph.calibrate.blocks import Block, block_influence, blocks_of
from modegpt_graph.calibrate.memory import Memory
from modegpt_graph.calibrate.observe import Calibrated
from modegpt_graph.calibrate.outliers import outlier_shares
from modegpt_graph.calibrate.statistics import Statistics
from modegpt_graph.match.modules import Placed, SiteModule
from modegpt_graph.match.prepare import Surveyed
from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.rewrite.apply import RewrittenModule, rewrite
from modegpt_graph.rewrite.budget import site_items
from modegpt_graph.rewrite.costs import BUDGETS, Costs
from modegpt_graph.rewrite.expected import expected_divergences
from modegpt_graph.rewrite.influence import influences
from modegpt_graph.rewrite.kinds import Kind, kinds_of
from modegpt_graph.rewrite.looseness import SHRINKAGE, Looseness, try_looseness
from modegpt_graph.rewrite.presets import PRESETS, Preset
from modegpt_graph.rewrite.problem import Solver
from modegpt_graph.rewrite.ranks import (
    block_ranks,
    curve_ranks,
    half_rank_divergences,
    half_ranks,
    layer_ranks,
    outlier_ranks,
    probe_tokens,
)
from modegpt_graph.rewrite.recalibrate import Recalibration
from modegpt_graph.rewrite.recalibrated import reached, recalibrated
from modegpt_graph.rewrite.selection import Trial, try_selections
from modegpt_graph.rewrite.shrunk import ShrunkSolver
from modegpt_graph.rewrite.solution import Solution

SURGEON = {"selection": "surgeon"}


@dataclass(frozen=True)
class Decomposed:
    """What all ratios have in common. Nothing here is changed by asking for one.

    modules: the sites in their modules.   layers: paths of the decoder layers.   solvers: site → its solver.
    items: parameters that a rank of each site has.   texts: (windows, window) each, the calibration text first.
    costs: what all of the model and each rank costs, in every budget.   preset: the algorithms.
    by_surgeon: sites whose features the surgeon chooses.   trials: how that came.   memory: what earlier runs found.
    """

    dense: nn.Module
    surveyed: Surveyed
    modules: tuple[SiteModule, ...]
    layers: tuple[str, ...]
    observed: Calibrated
    solvers: Mapping[str, Solver]
    items: tuple[Item, ...]
    texts: Sequence[Tensor]
    costs: Costs
    preset: Preset
    by_surgeon: frozenset[str] = frozenset()
    trials: tuple[Trial, ...] = ()
    memory: Memory = field(default_factory=Memory, repr=False)
    progress: Progress = field(default_factory=NullProgress, repr=False)

    @cached_property
    def divergences(self) -> dict[str, dict[int, float]]:
        """Site → rank → KL divergence in nats per token that the site alone causes.

        Measured at half rank when first asked for, and at further ranks by allocations that need them.
        """

        def measure() -> dict[str, float]:
            return half_rank_divergences(
                self.dense, self.modules, self.layers, self.items, self.solvers, self.tokens, self.progress
            )

        how = f"{self.preset.how}, by the surgeon: {sorted(self.by_surgeon)}"
        found = self.memory.divergences([item.id for item in self.items], how, measure)
        return {site: {rank: found[site]} for site, rank in half_ranks(self.items).items()}

    def _diverging(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """The divergence of sites at these ranks, each alone."""
        new = {site: rank for site, rank in ranks.items() if rank not in self.divergences[site]}
        probes = {site: self.solvers[site].solution(rank) for site, rank in new.items()}
        few = probe_tokens(self.tokens)
        found = influences(self.dense, self.modules, self.layers, probes, few, self.progress) if probes else {}
        for site, divergence in found.items():
            self.divergences[site][new[site]] = divergence
        return {site: self.divergences[site][rank] for site, rank in ranks.items()}

    @property
    def tokens(self) -> Tensor:
        """(windows, window) of the calibration text: what sites do to the logits is measured on it alone."""
        return self.texts[0]

    @property
    def total(self) -> int:
        """Decoder-layer linear parameters."""
        return self.costs.totals["parameters"]

    @cached_property
    def blocks(self) -> tuple[tuple[Block, ...], list[float | None]]:
        """Attention and MLP blocks, and the influence of each: measured when first asked for."""
        blocks = blocks_of(self.surveyed)
        return blocks, block_influence(self.dense, blocks, self.tokens, self.progress)

    @cached_property
    def outliers(self) -> Tensor:
        """(L,) share of outliers among the weights of each layer: measured when first asked for."""
        return outlier_shares(self.dense, self.surveyed, self.tokens, self.progress)

    def ranks(
        self,
        ratio: float,
        allocator: str = "curves",
        *,
        budget: str = "parameters",
        recalibrates: bool = False,
        without: Collection[str] = (),
        tolerance: float = TOLERANCE,
    ) -> dict[str, int]:
        """Rank of every site such that `ratio` of what a budget counts goes; sites that cost nothing there stay whole.

        recalibrates: whether it follows: `curves` then weighs what sites do alone.   without: ids of sites that
        are left whole too.   tolerance: how far from the ratio what goes may be.
        Raises InputError where the sites cannot give it.
        """
        items = [item for item in self.costs.items(self.items, budget) if item.id not in without]
        target = Target(self.costs.totals[budget], ratio, BUDGETS[budget], tolerance)
        if allocator == "curves":
            first = {site: {rank: self.divergences[site][rank]} for site, rank in half_ranks(self.items).items()}
            weights = self.reached if recalibrates else {}
            ranks = curve_ranks(items, self.solvers, weights, first, self._diverging, target)
        elif allocator == "split-influence":
            ranks = block_ranks(items, *self.blocks, self.observed.importance, target)
        elif allocator == "owl":
            ranks = outlier_ranks(items, self.outliers, target)
        else:
            ranks = layer_ranks(allocator, items, self.observed.importance, target)
        return {item.id: ranks.get(item.id, item.full_rank) for item in self.items}

    def solutions(self, ranks: Mapping[str, int], *, recalibrates: bool = False) -> dict[str, Solution]:
        """Solutions of the sites that are made smaller.

        recalibrates: whether it follows: where `loosened` helps, features then go less together, and the error is left
        to recalibration to see to, and to measure.
        """
        found = {}
        for item in self.items:
            site, rank = item.id, ranks[item.id]
            if rank == item.full_rank:
                continue
            solver = self.solvers[site]
            if recalibrates and site in self.loosened:
                solver = self._looser(self.loosened[site], self.observed.statistics[site], SHRINKAGE)
            found[site] = solver.start(rank) if isinstance(solver, ShrunkSolver) else solver.solution(rank)
        return found

    @cached_property
    def loosened(self) -> Mapping[str, Placed]:
        """The sites that recalibration starts from looser fits: it reaches them, and `looseness` helps."""
        kinds = kinds_of(self.modules, lambda placed: placed.site.id in self.reached)
        helped = [alike for kind, alike in kinds.items() if kind in self.looseness and self.looseness[kind].helps]
        return {placed.site.id: placed for alike in helped for placed in alike}

    @cached_property
    def reached(self) -> Mapping[str, float]:
        """The sites whose consumers recalibration fits, and how much what they do alone then counts."""
        return reached(self.dense, self.modules, self.layers, self.tokens)

    @cached_property
    def looseness(self) -> Mapping[Kind, Looseness]:
        """What looser fits do to other text: measured when first asked for."""
        return try_looseness(self.dense, self.modules, self.items, self.observed, self._looser)

    def _looser(self, placed: Placed, statistics: Statistics, shrinkage: float) -> Solver:
        recipe = SURGEON if placed.site.id in self.by_surgeon else {}
        return _solver(self.dense, self.modules, self.preset, placed, statistics, shrinkage=shrinkage, **recipe)

    def said(self, allocator: str, *, recalibrates: bool) -> tuple[str, ...]:
        """How it was chosen what to do, a sentence each."""
        trials = [one.said for one in self.trials]
        if self.observed.followed:
            trials.append(
                f"At {self.observed.followed} of {len(self.items)} sites a norm follows, and tokens count as it scales "
                "them: features are chosen and fitted for what enters the stream, and errors are of that."
            )
        if not recalibrates:
            return tuple(trials)
        loose = [one.said for one in self.looseness.values()]
        less = [weight for weight in self.reached.values() if weight < 1]
        if allocator != "curves" or not less:
            return *trials, *loose
        least, most = f"{min(less):.2f}", f"{max(less):.2f}"
        times = f"{most} times" if least == most else f"{least} to {most} times, the more the deeper they lie,"
        spread = (
            f"What sites do to the logits counts {times} at {len(less)} of {len(self.items)} when the ratio is spread: "
            "where recalibration fits two matrices and no norm follows, it makes up for more, and later layers for "
            "what early ones lose."
        )
        return *trials, spread, *loose

    def model(self, solutions: Mapping[str, Solution]) -> tuple[nn.Module, tuple[RewrittenModule, ...]]:
        """A copy of the dense model with these solutions in place, and the modules that were rewritten."""
        smaller = copy.deepcopy(self.dense)
        return smaller, rewrite(smaller, self.modules, solutions)

    def recalibrated(
        self, smaller: nn.Module, solutions: Mapping[str, Solution]
    ) -> tuple[dict[str, Solution], Recalibration]:
        """The solutions after the consumers of `smaller`, changed in place, were fitted to what they really read."""
        return recalibrated(
            self.dense,
            smaller,
            self.modules,
            self.layers,
            self.observed.statistics,
            solutions,
            self.texts,
            self.progress,
            self.preset.weighs_tokens,
        )

    def removed(self, ranks: Mapping[str, int], budget: str = "parameters") -> int:
        """What goes with these ranks, of what a budget counts."""
        return removed_cost(self.costs.items(self.items, budget), ranks)

    def highest_ratio(self, budget: str = "parameters") -> float:
        """The largest ratio that the sites can give."""
        return reachable_ratio(self.costs.items(self.items, budget), self.costs.totals[budget])

    def expected_divergence(self, ranks: Mapping[str, int]) -> float:
        """The KL divergence in nats per token that these ranks are expected to cause, as if the sites' own added up."""
        return sum(
            float(expected_divergences(self.solvers[site].errors, measured)[ranks[site]])
            for site, measured in self.divergences.items()
        )


def decompose(
    dense: nn.Module,
    surveyed: Surveyed,
    modules: tuple[SiteModule, ...],
    layers: tuple[str, ...],
    observed: Calibrated,
    texts: Sequence[Tensor],
    costs: Costs,
    *,
    preset: Preset = PRESETS["default"],
    memory: Memory | None = None,
    progress: Progress | None = None,
) -> Decomposed:
    """Every site's solver, by the preset's algorithms, from what was observed on the calibration tokens."""
    progress, memory = progress or NullProgress(), memory or Memory()
    sites = [placed for one in modules for placed in one.placed]

    def made(placed: Placed, **recipe: Any) -> Solver:
        return _solver(dense, modules, preset, placed, observed.statistics[placed.site.id], **recipe)

    solvers = {}
    with progress.stage("decompose", len(sites)) as stage:
        for placed in sites:
            solvers[placed.site.id] = made(placed)
            stage.advance()
    items, trials = site_items(modules), ()
    changed: dict[str, Solver] = {}
    if preset.tries_selections:
        surgeon = partial(made, **SURGEON)
        changed, trials = try_selections(
            dense, modules, layers, items, solvers, surgeon, texts[0], preset.how, memory, progress
        )
    return Decomposed(
        dense,
        surveyed,
        modules,
        layers,
        observed,
        solvers | changed,
        items,
        texts,
        costs,
        preset,
        frozenset(changed),
        trials,
        memory,
        progress,
    )


def _solver(
    dense: nn.Module,
    modules: Sequence[SiteModule],
    preset: Preset,
    placed: Placed,
    statistics: Statistics,
    **recipe: Any,
) -> Solver:
    """A site's solver by the preset's recipe, with these changes of it."""
    (path,) = (one.path for one in modules if any(own is placed for own in one.placed))
    return preset.solver(placed, dense.get_submodule(path), statistics, replace(preset.recipe, **recipe))
