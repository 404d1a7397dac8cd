"""What solvers solve: a consumer by its matrix and what it reads, summed over calibration tokens."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from modegpt_graph.decompose.numerics import energy, ratio_of
from modegpt_graph.flow.layout import Layout
from modegpt_graph.rewrite.bounds import Bounds
from modegpt_graph.rewrite.solution import Solution, spread_rows, taken
from modegpt_graph.trace.linear import Linear


class Solver(Protocol):
    """Everything that is known of one site before its rank is: one solver serves every ratio."""

    @property
    def errors(self) -> Tensor:
        """(d + 1,) relative squared error of the pair's output with 0..d features kept."""
        ...

    def solution(self, rank: int) -> Solution:
        """The site's matrices at `rank` features a group."""
        ...

    def bounds(self) -> Bounds | None:
        """What its errors can be at most; None where no proposition fits the site."""
        ...


@dataclass(frozen=True)
class Problem:
    """A consumer with its input features in the order (group, head, feature).

    gram: (N, N), or (N + 1, N + 1) where there is a bias.   weight: (N, D).
    """

    role: str
    gram: Tensor
    weight: Tensor
    bias: Tensor | None

    @cached_property
    def size(self) -> float:
        """‖X W + b‖²."""
        weight = self.weight if self.bias is None else torch.cat([self.weight, self.bias[None]])
        return float(energy(self.gram, weight))


def consumer_problem(
    module: nn.Module, linear: Linear, layout: Layout, role: str, gram: Tensor, copy: int | None = None
) -> Problem:
    """A consumer's problem in the order of the layout. copy: which expert of a tensor that holds several."""
    matrix, bias = linear.values(module, copy)
    weight, bias = matrix.T.double(), None if bias is None else bias.double()  # (N, D), (D,)
    order = layout.members[role].flatten()
    rows = torch.cat([order, torch.tensor([len(weight)])])[: len(order) + (bias is not None)]
    if torch.equal(order, torch.arange(len(weight))):  # as it is of most sites, where copies would be dear
        return Problem(role, gram[: len(rows), : len(rows)], weight, bias)
    return Problem(role, gram[rows][:, rows], weight[order], bias)


def consumer_error(problem: Problem, layout: Layout, solution: Solution) -> float:
    """‖X W + b − X E − b̂‖² / ‖X W + b‖² for what a solution makes of a consumer: E spreads it over all features."""
    rows, bias = solution.refits[problem.role]
    difference = problem.weight - spread_rows(layout.size, taken(layout, solution.kept), solution, rows)  # (N, D)
    if problem.bias is not None and bias is not None:
        difference = torch.cat([difference, (problem.bias - bias)[None]])
    return ratio_of(float(energy(problem.gram[: len(difference), : len(difference)], difference)), problem.size)
