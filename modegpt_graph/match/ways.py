"""A module with sites in it, in every way that calls take through it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property

from modegpt_graph.codegen.emit import emit
from modegpt_graph.errors import ModegptError
from modegpt_graph.match.forks import Pair, find_forks
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.products import attention_graph
from modegpt_graph.match.site_module import (
    Placed,
    SiteModule,
    are_all_uses,
    assembled,
    find_footprints,
    halved,
    is_written_anew,
    keeps_otherwise,
    matrices_of,
)
from modegpt_graph.trace.calls import Call
from modegpt_graph.trace.graph import Graph
from modegpt_graph.trace.precision import Exporter

MOST_FORKS = 8  # ways through one module that are written out


class Ways:
    """A module with some of its sites, in every way that calls take through it."""

    def __init__(
        self,
        path: str,
        graph: Graph,
        patterns: Sequence[Pattern],
        called: Callable[[Pair], Call | None],
        export: Exporter,
    ) -> None:
        self._path, self._graph, self._patterns, self._called, self._export = path, graph, patterns, called, export

    @cached_property
    def _forks(self) -> tuple[tuple[str, Graph], ...]:
        found = find_forks(self._graph.trace, self._called, self._export)
        return tuple((one.condition, attention_graph(one.trace)) for one in found)

    def assembled(self, placed: Iterable[Placed]) -> SiteModule:
        """The module for these sites; with no forks where its own forward method fits smaller matrices on every way.

        Raises ModegptError where a way cannot be told, or has not the same sites.
        """
        chosen = tuple(placed)
        one = assembled(self._path, self._graph, chosen)
        anew = is_written_anew(one, halved(one))
        if anew and self._graph.trace.call.obstacle is not None:
            raise ModegptError(self._graph.trace.call.obstacle)
        if anew and self._graph.trace.assumes_all:
            raise ModegptError("it loops over the experts that a batch reaches, and its trace is of all of them")
        if not anew and not self._graph.trace.branches and not self._graph.trace.call.others:
            return one
        try:
            forks = tuple((condition, self._fork(condition, graph, chosen)) for condition, graph in self._forks)
        except ModegptError:
            if anew:
                raise
            return one  # its own code goes its own ways
        if not anew and all(halved(fork).empty for _, fork in forks):
            return one
        other = next((name for _, fork in forks for name in keeps_otherwise(one, fork)), None)
        if other is not None:
            raise ModegptError(
                f"it does not keep the same features in `{other}` on every way that calls take through it"
            )
        if len(forks) > MOST_FORKS:
            raise ModegptError(f"it is called in {len(forks) + 1} ways, and each would need code of its own")
        return replace(one, forks=forks)

    def _fork(self, condition: str, graph: Graph, placed: Sequence[Placed]) -> SiteModule:
        """The same sites on another way."""
        found = find_footprints(self._path, graph, [one.site for one in placed], self._patterns)
        others = []
        for one in placed:
            uses = found.get(matrices_of(self._path, one.site), [])
            same = bool(uses) and are_all_uses(graph, uses) and uses[0].one.equals(one.footprint.one)
            if one.site.is_approximated or not same:
                raise ModegptError(f"where `{condition}`, it does not use the same features in the same way")
            others.append(Placed(one.site, uses[0], tuple(uses[1:])))
        if graph.trace.call.obstacle is not None:
            raise ModegptError(graph.trace.call.obstacle)
        return assembled(self._path, graph, others)

    def obstacle(self, placed: Iterable[Placed]) -> str | None:
        """Why the module cannot be written anew for fewer features of some sites; None where it can."""
        try:
            one = self.assembled(placed)
            edits = halved(one)
            if is_written_anew(one, edits) or one.forks:
                emit(one.trace, edits)
            for _, fork in one.forks:
                emit(fork.trace, halved(fork))
        except (ModegptError, RuntimeError, LookupError, TypeError, ValueError, NotImplementedError) as error:
            said = str(error).strip().splitlines()
            return f"its module cannot be written anew: {said[0] if said else type(error).__name__}"
        return None
