"""A consumer that is solved as if features went less together than they did in the calibration text."""

from dataclasses import replace

from torch import Tensor

from modegpt_graph.flow.layout import Layout
from modegpt_graph.rewrite.bounds import Bounds, ScaledBounds
from modegpt_graph.rewrite.problem import Problem, Solver, consumer_error
from modegpt_graph.rewrite.solution import Solution


class ShrunkSolver:
    """Solves a problem whose Gram matrix was shrunk; errors and bounds of solutions are of the one that was seen."""

    def __init__(self, seen: Problem, supposed: Problem, left: float, layout: Layout, solver: Solver) -> None:
        """solver: of what is supposed.   left: what is supposed is so many times what was seen, or more."""
        self.seen, self._supposed, self._left = seen, supposed, left
        self._layout, self._solver = layout, solver

    @property
    def errors(self) -> Tensor:
        """(d + 1,) as supposed."""
        return self._solver.errors

    def bounds(self) -> Bounds | None:
        """Those of what was supposed, as far as they tell of what was seen."""
        bounds = self._solver.bounds()
        told = self._left * self.seen.size
        return None if bounds is None else ScaledBounds(bounds, self._supposed.size / told if told > 0 else None)

    def solution(self, rank: int) -> Solution:
        """The site's matrices at `rank` features."""
        found = self._solver.solution(rank)
        return replace(found, relative_error=consumer_error(self.seen, self._layout, found))

    def start(self, rank: int) -> Solution:
        """The same, for further fits to begin with: its error is not measured."""
        return replace(self._solver.solution(rank), relative_error=None)
