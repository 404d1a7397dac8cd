"""The sites of a model, found again in the smallest modules that hold them, to be observed and rewritten there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from modegpt_graph.errors import ModegptError
from modegpt_graph.match.alike import differs_between_calls, parameters_of, relative, shape_of_call, structures
from modegpt_graph.match.analyse import Survey
from modegpt_graph.match.called import Calls
from modegpt_graph.match.decoder import common_path
from modegpt_graph.match.forks import MANY_TOKENS, ONE_TOKEN, Pair
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.products import attention_graph
from modegpt_graph.match.site_module import (
    Placed,
    SiteModule,
    are_all_uses,
    find_footprints,
    halved,
    is_written_anew,
    matrices_of,
    moved,
)
from modegpt_graph.match.sites import Site
from modegpt_graph.match.ways import Ways
from modegpt_graph.trace.calls import SIZES, Call
from modegpt_graph.trace.export import export
from modegpt_graph.trace.opaque import CacheCall
from modegpt_graph.trace.precision import Exporter


@dataclass(frozen=True)
class Found:
    """modules: those in which sites can be observed and rewritten.

    left: id of every other site → why its module cannot be written anew.
    """

    modules: tuple[SiteModule, ...]
    left: Mapping[str, str]


def site_modules(
    skeleton: nn.Module,
    survey: Survey,
    patterns: Sequence[Pattern],
    example_inputs: tuple | None = None,
    export: Exporter = export,
) -> Found:
    """Trace the smallest module of every site that can be decomposed, once for all modules that look alike.

    skeleton: the model on the meta device.   export: what traces a module of it.
    A module whose forward method is written anew runs what is within it as it was traced: modules within it that are
    written anew too are one with it, and so are those that change rows of the same matrix.
    """
    chosen = [one.site for one in survey.located if one.site.decomposition is not None]
    if not chosen:
        return Found((), {})
    paths = dict.fromkeys(path for site in chosen for path in _around(_module_of(site)))
    try:
        called = Calls(skeleton, tuple(paths), example_inputs)
    except ModegptError as error:
        return Found((), {site.id: str(error) for site in chosen})
    groups: dict[str, list[Site]] = {}
    for site in chosen:
        # Containers are not called: what is in them is the work of the module around them.
        path = next(path for path in _around(_module_of(site)) if path in called.at(SIZES))
        groups.setdefault(path, []).append(site)
    tracer = _Tracer(skeleton, survey, patterns, called, export)
    order = {one.site.id: number for number, one in enumerate(survey.located)}
    modules: dict[str, SiteModule | None] = {}
    left: dict[str, str] = {}
    for path in sorted(groups, key=lambda path: path.count(".") + bool(path)):  # the outer ones first
        if path not in groups:
            continue
        within = [other for other in groups if other != path and (not path or other.startswith(f"{path}."))]
        sites, joined = list(groups[path]), [path]
        while more := [o for o in within if o not in joined and _parameters(sites) & _parameters(groups[o])]:
            sites += [site for other in more for site in groups[other]]
            joined += more
        alone = joined
        if len(joined) <= len(within) and tracer.is_written_anew(path, sites):
            joined = alone + [o for o in within if o not in alone and tracer.is_written_anew(o, groups[o])]
            sites += [site for other in joined if other not in alone for site in groups[other]]
        found, reasons = tracer.traced(path, sorted(sites, key=lambda site: order[site.id]))
        if found is None and joined != alone:  # what is within it can still be written anew where it is not
            own = {site.id for other in alone for site in groups[other]}
            joined, reasons = alone, {site: reason for site, reason in reasons.items() if site in own}
        modules[path] = found
        left |= reasons
        for other in joined[1:]:
            del groups[other]
    return Found(tuple(one for path in groups if (one := modules[path]) is not None), left)


class _Tracer:
    """Traces modules, once for all that look alike."""

    def __init__(
        self, skeleton: nn.Module, survey: Survey, patterns: Sequence[Pattern], called: Calls, export: Exporter
    ) -> None:
        self._skeleton, self._patterns, self._called, self._export = skeleton, patterns, called, export
        self._calls = called.at(SIZES)
        self._graph = survey.located[0].outline.graph
        self._structures = structures(self._graph, self._calls)
        self._known: dict[object, tuple[SiteModule | None, dict[int, str]]] = {}
        self._anew: dict[object, bool] = {}

    def traced(self, path: str, sites: Sequence[Site]) -> tuple[SiteModule | None, dict[str, str]]:
        """A module with its sites in it, None where that is none of them; site id → why it is not in it."""
        module, call, key = self._skeleton.get_submodule(path), self._calls[path], self._key(path, sites)
        if key not in self._known:
            if not call.others and differs_between_calls(self._graph, path):
                call = replace(call, obstacle="it does not do the same each time that the model calls it")
            self._known[key] = _examined(
                path,
                module,
                call,
                sites,
                self._patterns,
                lambda pair: self._called.at(pair).get(path),
                self._export,
            )
        known, reasons = self._known[key]
        left = {sites[number].id: reason for number, reason in reasons.items()}
        placed = [site for number, site in enumerate(sites) if number not in reasons]
        return None if known is None else moved(known, path, module, call, placed), left

    def is_written_anew(self, path: str, sites: Sequence[Site]) -> bool:
        """Whether a module needs another forward method, to be observed or for fewer features."""
        key = self._key(path, sites)
        if key not in self._anew:
            found, _ = self.traced(path, sites)
            self._anew[key] = found is not None and is_written_anew(found, halved(found))
        return self._anew[key]

    def _key(self, path: str, sites: Sequence[Site]) -> object:
        module, found = self._skeleton.get_submodule(path), tuple(relative(path, site) for site in sites)
        kind = type(module), parameters_of(module)
        calls = [self._called.at(pair).get(path) for pair in (SIZES, ONE_TOKEN, MANY_TOKENS)]
        ways = tuple(shape_of_call(one) for call in calls if call is not None for one in (call, *call.others))
        return self._structures[path], kind, ways, found


def _parameters(sites: Sequence[Site]) -> set[str]:
    return {role.parameter for site in sites for role in site.roles.values()}


def _examined(
    path: str,
    module: nn.Module,
    call: Call,
    sites: Sequence[Site],
    patterns: Sequence[Pattern],
    called: Callable[[Pair], Call | None],
    export: Exporter,
) -> tuple[SiteModule | None, dict[int, str]]:
    """A module with those of its sites that can be observed and rewritten in it; number of another → why not."""
    try:
        trace = export(module, call)
        if sum(isinstance(said, CacheCall) for said in trace.calls) != len(call.cache_layers):
            raise ModegptError("not every cache that it updates is the one that the model hands on")
        graph = attention_graph(trace)
        found = find_footprints(path, graph, sites, patterns)
    except ModegptError as error:
        return None, dict.fromkeys(range(len(sites)), f"its module cannot be traced on its own: {error}")
    reasons, placed = {}, {}
    for number, site in enumerate(sites):
        uses = found.get(matrices_of(path, site), [])
        if not uses:
            reasons[number] = "it is found in the whole model, but not in its module on its own"
        elif not are_all_uses(graph, uses):
            reasons[number] = "its module uses its matrices more than once, and not in the same way each time"
        else:
            placed[number] = Placed(site, uses[0], tuple(uses[1:]))
    ways = Ways(path, graph, patterns, called, export)
    if ways.obstacle(placed.values()) is not None:
        alone = {number: ways.obstacle([one]) for number, one in placed.items()}
        reasons |= {number: obstacle for number, obstacle in alone.items() if obstacle is not None}
        placed = {number: one for number, one in placed.items() if number not in reasons}
        obstacle = ways.obstacle(placed.values())
        if obstacle is not None:
            return None, reasons | dict.fromkeys(placed, obstacle)
    return (ways.assembled(placed.values()) if placed else None), reasons


def _module_of(site: Site) -> str:
    return common_path(role.parameter for role in site.roles.values())


def _around(path: str) -> list[str]:
    """A module's path and those of the modules around it, the innermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
