"""Recalibration of a decomposed model: which consumers may change, and the solutions that come of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import ConsumerStatistics, Statistics
from modegpt_graph.match.site_module import Placed, SiteModule, projection_module
from modegpt_graph.progress import Progress
from modegpt_graph.rewrite.apply import columns_in, refit_in, rows_in
from modegpt_graph.rewrite.linears import linear_at
from modegpt_graph.rewrite.problem import consumer_error, consumer_problem
from modegpt_graph.rewrite.recalibrate import Matrix, Producers, recalibrate
from modegpt_graph.rewrite.solution import Solution
from modegpt_graph.trace.linear import Linear


def recalibrated(
    dense: nn.Module,
    smaller: nn.Module,
    modules: Sequence[SiteModule],
    layers: Sequence[str],
    statistics: Mapping[str, Statistics],
    solutions: Mapping[str, Solution],
    starts: Mapping[str, Solution],
    texts: Sequence[Tensor],
    progress: Progress | None = None,
) -> dict[str, Solution]:
    """The solutions with consumers, and producers that scale, that fit what `smaller`, changed in place, computes.

    A consumer of several sites, which reads what they make side by side, is left as it is.
    smaller: the dense model rewritten by `solutions`.   starts: site → a solution with the same features, which the fit
    of its consumer begins with.   Errors are those of the new matrices, on the inputs that the
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
    producers = {
        path: _producers(smaller, *places[path])
        for path, may in may_change.items()
        if may and _is_alone(places[path][0], modules)
    }
    watched = {*places, *(path for own in producers.values() for path in own)}
    before = {path: linear_at(smaller, path).weight.data for path in watched}
    sources = {path: Producers(list(own), places[path][0].path) for path, own in producers.items()}
    first = {
        path: _start(linear_at(smaller, path), placed, starts[placed.site.id])
        for path, (_, placed) in places.items()
        if may_change[path] and placed.site.id in starts
    }
    errors = recalibrate(dense, smaller, layers, may_change, texts, progress, sources, first)
    changed = {path for path, data in before.items() if linear_at(smaller, path).weight.data_ptr() != data.data_ptr()}
    found = dict(solutions)
    for path, (one, placed) in places.items():
        layout, site = placed.footprint.layout, placed.site.id
        for producer, members in producers.get(path, {}).items():
            if producer in changed:
                rows = rows_in(linear_at(smaller, producer), members, layout, found[site])
                found[site] = replace(found[site], rows={**found[site].rows, **rows})
        if path in errors:
            found[site] = replace(found[site], relative_error=errors[path])
        own = statistics[site]
        if path not in changed or not isinstance(own, ConsumerStatistics):
            continue
        ((role, product),) = placed.footprint.outline.consumers.items()
        members = layout.members[role]
        refit = refit_in(linear_at(smaller, path), members, layout, found[site])
        found[site] = replace(found[site], refits={role: refit})
        if path not in errors:
            problem = consumer_problem(dense.get_submodule(one.path), product, layout, role, own.gram)
            found[site] = replace(found[site], relative_error=consumer_error(problem, layout, found[site]))
    return found


def _start(linear: nn.Linear, placed: Placed, solution: Solution) -> Matrix:
    """The matrix that a consumer has by another solution with the same features."""
    ((role, (rows, bias)),) = solution.refits.items()
    layout = placed.footprint.layout
    weight = linear.weight.detach().double().T.clone()
    weight[columns_in(linear, layout.members[role], layout, solution)] = rows
    return weight.T.to(linear.weight.dtype), bias


def _is_alone(one: SiteModule, modules: Sequence[SiteModule]) -> bool:
    """Whether a module has one site and none further within, so that what it puts out tells of that site."""
    prefix = f"{one.path}." if one.path else ""
    return len(one.placed) == 1 and not any(other.path.startswith(prefix) for other in modules if other is not one)


def _producers(smaller: nn.Module, one: SiteModule, placed: Placed) -> dict[str, dict[str, Tensor]]:
    """Path of each producer that is a linear module → role → (G, g, d) its rows there."""
    found: dict[str, dict[str, Tensor]] = {}
    for role, product in placed.footprint.outline.producers.items():
        path = _linear_path(smaller, one, product)
        if path is not None:
            found.setdefault(path, {})[role] = placed.footprint.layout.members[role]
    return found


def _places(smaller: nn.Module, modules: Sequence[SiteModule]) -> dict[str, tuple[SiteModule, Placed]]:
    """Path of each consumer that is a linear module in the smaller model → its site."""
    places = {}
    for one in modules:
        for placed in one.placed:
            for product in placed.footprint.outline.consumers.values():
                path = _linear_path(smaller, one, product)
                if path is not None and product.experts is None:
                    places[path] = (one, placed)
    return places


def _linear_path(smaller: nn.Module, one: SiteModule, product: Linear) -> str | None:
    """Of the `nn.Linear` in the smaller model that does nothing but this product; None where there is none."""
    inner = projection_module(one, product)
    path = ".".join(filter(None, (one.path, inner))) if inner is not None else None
    return path if path is not None and type(smaller.get_submodule(path)) is nn.Linear else None
