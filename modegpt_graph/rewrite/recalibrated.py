"""Recalibration of a decomposed model: which consumers may change, and the solutions that come of it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from modegpt_graph.calibrate.statistics import ConsumerStatistics, Statistics
from modegpt_graph.calibrate.stream import PROBE_TOKENS, stream_entries
from modegpt_graph.match.consumers import consumer_places, linear_path
from modegpt_graph.match.site_module import Placed, SiteModule
from modegpt_graph.progress import Progress
from modegpt_graph.rewrite.apply import refit_in, rows_in
from modegpt_graph.rewrite.linears import linear_at
from modegpt_graph.rewrite.problem import consumer_error, consumer_problem
from modegpt_graph.rewrite.recalibrate import Producers, Recalibration, recalibrate
from modegpt_graph.rewrite.scaling import find_scalings
from modegpt_graph.rewrite.solution import Solution

# How much what a site alone does to the logits counts where recalibration fits two matrices and no norm follows: the
# best of 0.35 to 1 on the demo model. Where one does, 1 was the best of 0.5 to 2 on Gemma 3 270M.
LEFT = 0.5
# Logarithm of how much more of that is left in the last layer than in the first: later consumers too are fitted to make
# up for what early sites lose. On the demo model, at two ratios and on held-out text of two kinds, better than 0 in all
# four, and than 1.6 in three.
DEEPER = 0.8


def recalibrated(
    dense: nn.Module,
    smaller: nn.Module,
    modules: Sequence[SiteModule],
    layers: Sequence[str],
    statistics: Mapping[str, Statistics],
    solutions: Mapping[str, Solution],
    texts: Sequence[Tensor],
    progress: Progress | None = None,
    weighs_tokens: bool = True,
) -> tuple[dict[str, Solution], Recalibration]:
    """The solutions with consumers, and producers that scale, that fit what `smaller`, changed in place, computes; and
    what was fitted.

    A consumer of several sites, which reads what they make side by side, is left as it is.
    smaller: the dense model rewritten by `solutions`.   weighs_tokens: whether tokens count in `statistics`, and so in
    errors, as a norm that follows a consumer scales what that puts out.   Errors are those of the new matrices, on the
    inputs that the sites have in the dense model, as all errors are.
    """
    places = consumer_places(smaller, modules)
    alone = _with_consumers_of_their_own(modules)
    may_change = {path: placed.site.id in alone & solutions.keys() for path, (_, placed) in places.items()}
    producers = {
        path: _producers(smaller, *places[path])
        for path, may in may_change.items()
        if may and _is_alone(places[path][0], modules)
    }
    sources = {path: Producers(list(own), places[path][0].path) for path, own in producers.items()}
    fitted = recalibrate(dense, smaller, layers, may_change, texts, progress, sources, weighs_tokens)
    found = dict(solutions)
    for path, (one, placed) in places.items():
        layout, site = placed.footprint.layout, placed.site.id
        if path in fitted.producers:
            producer = fitted.producers[path]
            rows = rows_in(linear_at(smaller, producer), producers[path][producer], layout, found[site])
            found[site] = replace(found[site], rows={**found[site].rows, **rows})
        own = statistics[site]
        if site not in found or not isinstance(own, ConsumerStatistics):
            continue
        ((role, product),) = placed.footprint.outline.consumers.items()
        if path in fitted.consumers:
            refit = refit_in(linear_at(smaller, path), layout.members[role], layout, found[site])
            found[site] = replace(found[site], refits={role: refit})
        if path in fitted.errors:
            found[site] = replace(found[site], relative_error=fitted.errors[path])
        elif path in fitted.consumers or found[site].relative_error is None:
            problem = consumer_problem(dense.get_submodule(one.path), product, layout, role, own.gram)
            found[site] = replace(found[site], relative_error=consumer_error(problem, layout, found[site]))
    return found, fitted


def reached(dense: nn.Module, modules: Sequence[SiteModule], layers: Sequence[str], tokens: Tensor) -> dict[str, float]:
    """The sites whose consumers recalibration fits once they are made smaller, and how much what they do alone counts.

    tokens: (windows, window).
    """
    some, alone = tokens[:1, :PROBE_TOKENS], _with_consumers_of_their_own(modules)
    places = consumer_places(dense, modules)
    entries = stream_entries(dense, layers, places, some)
    found = {path: places[path] for path in entries if places[path][1].site.id in alone}
    sources = {path: list(_producers(dense, *place)) for path, place in found.items() if _is_alone(place[0], modules)}
    scalings = find_scalings(dense, sources, some)
    made_up_for = {path for path in scalings if not entries[path].is_normed}
    return {
        placed.site.id: _left(placed.site.layer, len(layers)) if path in made_up_for else 1.0
        for path, (_, placed) in found.items()
    }


def _left(layer: int | None, layers: int) -> float:
    """How much what a site of one of so many layers does alone counts where recalibration fits two matrices."""
    return LEFT if layer is None or layers < 2 else LEFT * math.exp(DEEPER * (layer / (layers - 1) - 0.5))


def _with_consumers_of_their_own(modules: Sequence[SiteModule]) -> set[str]:
    """Ids of the sites whose consumers read nothing of other sites."""
    consumers = {
        placed.site.id: [(one.path, product.weight) for product in placed.footprint.outline.consumers.values()]
        for one in modules
        for placed in one.placed
    }
    readers = Counter(one for own in consumers.values() for one in own)
    return {site for site, own in consumers.items() if all(readers[one] == 1 for one in own)}


def _is_alone(one: SiteModule, modules: Sequence[SiteModule]) -> bool:
    """Whether a module has one site and none further within, so that what it puts out tells of that site."""
    prefix = f"{one.path}." if one.path else ""
    return len(one.placed) == 1 and not any(other.path.startswith(prefix) for other in modules if other is not one)


def _producers(smaller: nn.Module, one: SiteModule, placed: Placed) -> dict[str, dict[str, Tensor]]:
    """Path of each producer that is a linear module → role → (G, g, d) its rows there."""
    found: dict[str, dict[str, Tensor]] = {}
    for role, product in placed.footprint.outline.producers.items():
        path = linear_path(smaller, one, product)
        if path is not None:
            found.setdefault(path, {})[role] = placed.footprint.layout.members[role]
    return found
