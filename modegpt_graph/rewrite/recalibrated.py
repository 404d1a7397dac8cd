"""Recalibration of a decomposed model: which consumers may change, and the solutions that come of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import ConsumerStatistics, Statistics
from modegpt_graph.match.site_module import Placed, SiteModule, projection_module
from modegpt_graph.progress import Progress
from modegpt_graph.rewrite.apply import refit_in
from modegpt_graph.rewrite.recalibrate import recalibrate
from modegpt_graph.rewrite.solution import Solution
from modegpt_graph.rewrite.solve import consumer_error, consumer_problem


def recalibrated(
    dense: nn.Module,
    smaller: nn.Module,
    modules: Sequence[SiteModule],
    layers: Sequence[str],
    statistics: Mapping[str, Statistics],
    solutions: Mapping[str, Solution],
    texts: Sequence[Tensor],
    progress: Progress | None = None,
) -> dict[str, Solution]:
    """The solutions with consumers that fit what `smaller`, changed in place, really computes.

    A consumer of several sites, which reads what they make side by side, is left as it is.
    smaller: the dense model rewritten by `solutions`.   Errors are those of the new matrices, on the inputs that the
    sites have in the dense model, as all errors are.
    """
    places = _places(smaller, modules)
    readers = Counter(
        (one.path, product.weight)
        for one in modules
        for placed in one.placed
        for product in placed.footprint.outline.consumers.values()
    )
    may_change = {
        path: placed.site.id in solutions
        and all(readers[one.path, product.weight] == 1 for product in placed.footprint.outline.consumers.values())
        for path, (one, placed) in places.items()
    }
    before = {path: smaller.get_parameter(f"{path}.weight").data for path in places}
    recalibrate(dense, smaller, layers, may_change, texts, progress)
    found = dict(solutions)
    for path, (one, placed) in places.items():
        own = statistics[placed.site.id]
        linear = smaller.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        unchanged = linear.weight.data_ptr() == before[path].data_ptr()
        if not may_change[path] or unchanged or not isinstance(own, ConsumerStatistics):
            continue
        ((role, product),) = placed.footprint.outline.consumers.items()
        layout = placed.footprint.layout
        members = layout.members[role]
        refit = refit_in(linear, members, layout, solutions[placed.site.id])
        changed = replace(solutions[placed.site.id], refits={role: refit})
        problem = consumer_problem(dense.get_submodule(one.path), product, layout, role, own.gram)
        error = consumer_error(problem, members, layout, changed)
        found[placed.site.id] = replace(changed, relative_error=error)
    return found


def _places(smaller: nn.Module, modules: Sequence[SiteModule]) -> dict[str, tuple[SiteModule, Placed]]:
    """Path of each consumer that is a linear module in the smaller model → its site."""
    places = {}
    for one in modules:
        for placed in one.placed:
            for product in placed.footprint.outline.consumers.values():
                inner = projection_module(one, product)
                path = ".".join(filter(None, (one.path, inner))) if inner is not None else None
                if path is not None and product.experts is None and type(smaller.get_submodule(path)) is nn.Linear:
                    places[path] = (one, placed)
    return places
