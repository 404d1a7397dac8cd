"""The paper's three algorithms to the letter, each as the solver of a site."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.inputs import ValueStatistics
from modegpt_graph.calibrate.norms import NormStatistics
from modegpt_graph.calibrate.statistics import ExpertStatistics, ScoreStatistics, Statistics
from modegpt_graph.decompose.elimination import eliminate_in_order
from modegpt_graph.decompose.numerics import energy, ratio_of
from modegpt_graph.decompose.nystrom import consumer, refit_rows, selection_order
from modegpt_graph.decompose.value_output import paper_value_output
from modegpt_graph.match.site_module import Placed
from modegpt_graph.rewrite.bounds import Bounds, ColumnsBounds, ValueBounds
from modegpt_graph.rewrite.problem import Problem, Solver, consumer_problem
from modegpt_graph.rewrite.solution import Solution
from modegpt_graph.rewrite.solve import Recipe, ScoreBlocks, solver


def paper_solver(placed: Placed, module: nn.Module, statistics: Statistics, recipe: Recipe) -> Solver:
    """The paper's algorithm for a site; ours, with the same recipe, where the paper has none.

    The paper has none for features of attention outputs that commute with single columns only, for experts that saw no
    tokens, and for norms that are approximated. Where it would cut pairs of a rotary embedding apart, which changes
    what the model computes, pairs are scored by both of their columns. Raises as `solver`.
    """
    if isinstance(statistics, ScoreStatistics) and not isinstance(statistics, NormStatistics):
        return ScoreBlocks(placed, statistics, recipe)  # also where the SVD would do better: algorithm 2 is the paper's
    consumers = placed.footprint.outline.consumers
    if len(consumers) != 1 or isinstance(statistics, (ExpertStatistics, ScoreStatistics)):
        return solver(placed, module, statistics, recipe)
    ((role, linear),) = consumers.items()
    layout = placed.footprint.layout
    if isinstance(statistics, ValueStatistics):
        problem = consumer_problem(module, linear, layout, role, statistics.gram)
        return PaperBasis(placed, module, problem, statistics.inputs)
    if placed.site.decomposition == "nystrom" and layout.members[role][..., 0].numel() == 1:
        return PaperColumns(consumer_problem(module, linear, layout, role, statistics.gram), recipe)
    return solver(placed, module, statistics, recipe)


class PaperColumns:
    """Algorithm 1: the k largest ridge leverage scores, and Ŵ_down = (Sᵀ C S)⁻¹ Sᵀ C W_down.

    C is Zᵀ Z alone and a bias stays as it is: the paper knows none.
    """

    def __init__(self, problem: Problem, recipe: Recipe) -> None:
        count = problem.weight.shape[0]
        self._role = problem.role
        self._total = problem.size
        self._problem = consumer(problem.gram[:count, :count], problem.weight)
        gram, weight = self._problem.gram, self._problem.weight
        order = selection_order(gram, weight, "leverage", ridge=0.0, leverage_ridge=recipe.leverage_ridge)
        self._elimination = eliminate_in_order(gram, weight, order, ridge=0.0, total=self._total)
        self.errors = self._elimination.errors

    def bounds(self) -> Bounds:
        """Proposition 1."""
        return ColumnsBounds(replace(self._problem, total=self._total), self._elimination)

    def solution(self, rank: int) -> Solution:
        """The `rank` features with the largest scores."""
        kept = self._elimination.kept(rank)
        found = refit_rows(self._problem, kept, 0.0)
        error = ratio_of(found.relative_error * self._problem.total, self._total)
        return Solution((kept[None],), {}, {self._role: (found.down.view(1, 1, rank, -1), None)}, error)


class PaperBasis:
    """Algorithm 3: C^{1/2} W_v = U Σ Vᵀ with C = [X, 1]ᵀ [X, 1] of what the value projection reads; then, where a value
    head has one output head, the second SVD, of Σ Vᵀ W_o; where it has several, none, as the paper does it.

    errors: of the paper's objective, which leaves out what attention mixes; a solution's error is that of the outputs.
    """

    def __init__(self, placed: Placed, module: nn.Module, problem: Problem, inputs: Tensor) -> None:
        self._layout, self._problem, self._inputs = placed.footprint.layout, problem, inputs
        ((self._role, linear),) = placed.footprint.outline.producers.items()
        matrix, offset = linear.values(module)
        rows = matrix.double()  # (N, D)
        bias = rows.new_zeros(len(rows)) if offset is None else offset.double()
        members = self._layout.members[self._role][:, 0]  # (G, d)
        self._value = torch.cat([rows, bias[:, None]], 1)[members].mT  # (G, D + 1, d)
        groups, heads, size = self._layout.members[problem.role].shape
        self._output = problem.weight.view(groups, heads, size, -1)
        closed = paper_value_output(inputs, self._value, self._output, size, stacked=heads == 1)
        self.errors, self._nested = closed.errors, closed.basis

    def bounds(self) -> Bounds:
        """Proposition 3, of the paper's objective."""
        own = self._value.mT @ self._inputs.double() @ self._value  # (G, d, d)
        grams = ((own + own.mT) / 2)[:, None].expand(-1, self._output.shape[1], -1, -1)
        return ValueBounds(grams, self._output, self._nested)

    def solution(self, rank: int) -> Solution:
        """The `rank` strongest directions of every group."""
        problem, output = self._problem, self._output
        found = paper_value_output(self._inputs, self._value, output, rank, stacked=output.shape[1] == 1)
        spread = (found.basis[:, None] @ found.output).flatten(0, 2)
        count = len(spread)
        lost = float(energy(problem.gram[:count, :count], problem.weight - spread))
        kept = (torch.arange(rank).expand(self._layout.groups, -1),)
        refits = {problem.role: (found.output, None)}
        return Solution(kept, {self._role: found.basis[:, None]}, refits, ratio_of(lost, problem.size))
