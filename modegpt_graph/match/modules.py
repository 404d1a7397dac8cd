"""The sites of a model, found again in the smallest modules that hold them, to be observed and rewritten there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from modegpt_graph.codegen.emit import emit
from modegpt_graph.errors import ModegptError
from modegpt_graph.flow.labels import Flow, follow
from modegpt_graph.flow.layout import LayoutError
from modegpt_graph.flow.shrink import Edits, Selection, shrink
from modegpt_graph.match.alike import parameters_of, relative, shape_of_call, structures
from modegpt_graph.match.analyse import Survey, roles_of
from modegpt_graph.match.decoder import common_path
from modegpt_graph.match.footprint import Footprint, Outline, locate, outline, starts_of
from modegpt_graph.match.matcher import Matcher
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.probe import random_blocks, selection_of
from modegpt_graph.match.products import attention_graph
from modegpt_graph.match.sites import Role, Site
from modegpt_graph.trace.calls import Call, record_calls
from modegpt_graph.trace.export import Trace, export
from modegpt_graph.trace.graph import Graph
from modegpt_graph.trace.linear import Linear
from modegpt_graph.trace.opaque import CacheCall


@dataclass(frozen=True)
class Placed:
    """A site within its module: the same features, in the graph of the module as the model calls it."""

    site: Site
    footprint: Footprint


@dataclass(frozen=True)
class SiteModule:
    """One module, traced as the model calls it, with the sites in it.

    path: in the model.   producers: weight name in the module → the product with it, for every selected role.
    flow: features of all sites followed together; offsets: weight name → its first label.
    """

    path: str
    trace: Trace
    graph: Graph
    placed: tuple[Placed, ...]
    producers: Mapping[str, Linear]
    offsets: Mapping[str, int]
    region: tuple[fx.Node, ...]
    flow: Flow


@dataclass(frozen=True)
class Found:
    """modules: those in which sites can be observed and rewritten.

    left: id of every other site → why its module cannot be written anew.
    """

    modules: tuple[SiteModule, ...]
    left: Mapping[str, str]


def site_modules(
    skeleton: nn.Module, survey: Survey, patterns: Sequence[Pattern], example_inputs: tuple | None = None
) -> Found:
    """Trace the smallest module of every site that can be decomposed, once for all modules that look alike.

    skeleton: the model on the meta device.
    A module whose forward method is written anew runs what is within it as it was traced: modules within it that are
    written anew too are one with it, and so are those that change rows of the same matrix.
    """
    groups: dict[str, list[Site]] = {}
    for one in survey.located:
        if one.site.decomposition is not None:
            groups.setdefault(_module_of(one.site), []).append(one.site)
    if not groups:
        return Found((), {})
    try:
        calls = record_calls(skeleton, groups, example_inputs)
    except ModegptError as error:
        return Found((), {site.id: str(error) for sites in groups.values() for site in sites})
    tracer = _Tracer(skeleton, survey, patterns, calls)
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
        self, skeleton: nn.Module, survey: Survey, patterns: Sequence[Pattern], calls: Mapping[str, Call]
    ) -> None:
        self._skeleton, self._patterns, self._calls = skeleton, patterns, calls
        self._structures = structures(survey.located[0].outline.graph, calls)
        self._known: dict[object, tuple[SiteModule | None, dict[int, str]]] = {}
        self._anew: dict[object, bool] = {}

    def traced(self, path: str, sites: Sequence[Site]) -> tuple[SiteModule | None, dict[str, str]]:
        """A module with its sites in it, None where that is none of them; site id → why it is not in it."""
        if path not in self._calls:
            reason = "the model never calls its module as it is: it cannot be traced on its own"
            return None, dict.fromkeys((site.id for site in sites), reason)
        module, call, key = self._skeleton.get_submodule(path), self._calls[path], self._key(path, sites)
        if key not in self._known:
            self._known[key] = _examined(path, module, call, sites, self._patterns)
        known, reasons = self._known[key]
        left = {sites[number].id: reason for number, reason in reasons.items()}
        placed = [site for number, site in enumerate(sites) if number not in reasons]
        return None if known is None else _moved(known, path, module, call, placed), left

    def is_written_anew(self, path: str, sites: Sequence[Site]) -> bool:
        """Whether a module needs another forward method, to be observed or for fewer features."""
        key = self._key(path, sites) if path in self._calls else None
        if key not in self._anew:
            found, _ = self.traced(path, sites)
            self._anew[key] = found is not None and _is_written_anew(found, _halved(found))
        return self._anew[key]

    def _key(self, path: str, sites: Sequence[Site]) -> object:
        module, found = self._skeleton.get_submodule(path), tuple(relative(path, site) for site in sites)
        kind = type(module), parameters_of(module)
        return self._structures[path], kind, shape_of_call(self._calls[path]), found


def _parameters(sites: Sequence[Site]) -> set[str]:
    return {role.parameter for site in sites for role in site.roles.values()}


def _examined(
    path: str, module: nn.Module, call: Call, sites: Sequence[Site], patterns: Sequence[Pattern]
) -> tuple[SiteModule | None, dict[int, str]]:
    """A module with those of its sites that can be observed and rewritten in it; number of another → why not."""
    try:
        trace = export(module, call)
        if sum(isinstance(said, CacheCall) for said in trace.calls) != len(call.cache_layers):
            raise ModegptError("not every cache that it updates is the one that the model hands on")
        graph = attention_graph(trace)
        found = _footprints(path, graph, sites, patterns)
    except ModegptError as error:
        return None, dict.fromkeys(range(len(sites)), f"its module cannot be traced on its own: {error}")
    reasons, placed = {}, {}
    for number, site in enumerate(sites):
        footprint = found.get(_matrices(path, site))
        if footprint is None:
            reasons[number] = "it is found in the whole model, but not in its module on its own"
        else:
            placed[number] = Placed(site, footprint)
    if _obstacle(path, graph, placed.values()) is not None:
        alone = {number: _obstacle(path, graph, [one]) for number, one in placed.items()}
        reasons |= {number: obstacle for number, obstacle in alone.items() if obstacle is not None}
        placed = {number: one for number, one in placed.items() if number not in reasons}
        obstacle = _obstacle(path, graph, placed.values())
        if obstacle is not None:
            return None, reasons | dict.fromkeys(placed, obstacle)
    return (_assembled(path, graph, placed.values()) if placed else None), reasons


def _obstacle(path: str, graph: Graph, placed: Iterable[Placed]) -> str | None:
    """Why a module cannot be written anew for fewer features of some sites; None where it can."""
    try:
        one = _assembled(path, graph, placed)
        edits = _halved(one)
        if _is_written_anew(one, edits):
            if one.trace.call.obstacle is not None:
                raise ModegptError(one.trace.call.obstacle)
            if one.trace.assumes_all:
                raise ModegptError("it loops over the experts that a batch reaches, and its trace is of all of them")
            emit(one.trace, edits)
    except (ModegptError, RuntimeError, LookupError, TypeError, ValueError, NotImplementedError) as error:
        said = str(error).strip().splitlines()
        return f"its module cannot be written anew: {said[0] if said else type(error).__name__}"
    return None


def _halved(one: SiteModule) -> Edits:
    """What changes in a module when every site keeps half of its blocks, in another order."""
    generator = torch.Generator().manual_seed(0)
    count = one.flow.classes.count
    chosen = [
        selection_of(p.footprint.one, random_blocks(p.footprint.one, generator), labels_of(one, p), count)
        for p in one.placed
    ]
    return shrink(one.region, one.flow, Selection.merged(chosen, count))


def _is_written_anew(one: SiteModule, halved: Edits) -> bool:
    observed = any(p.site.is_approximated or observed_input(one, p.footprint) is None for p in one.placed)
    return observed or not halved.empty


def observed_input(one: SiteModule, footprint: Footprint) -> str | None:
    """The `nn.Linear` whose whole input is what the site's consumer reads; None where there is no such module."""
    found = (projection_module(one, consumer) for consumer in footprint.outline.consumers.values())
    return next((path for path in found if path is not None), None)


def projection_module(one: SiteModule, linear: Linear) -> str | None:
    """The `nn.Linear` that does nothing but this product; None where there is no such module."""
    path = linear.weight.rpartition(".")[0]
    stack = list((linear.node.meta.get("nn_module_stack") or {"": ("", "")}).values())
    is_whole = type(one.trace.module.get_submodule(path)) is nn.Linear and stack[-1][0] == f"module.{path}"
    return path if is_whole else None


def labels_of(one: SiteModule, placed: Placed) -> dict[str, Tensor]:
    """Selected role → (G, g, d) labels of its rows, in the labels of the whole module."""
    producers = placed.footprint.outline.producers
    return {role: placed.footprint.one.members[role] + one.offsets[linear.weight] for role, linear in producers.items()}


def _module_of(site: Site) -> str:
    return common_path(role.parameter for role in site.roles.values())


def _matrices(path: str, site: Site) -> object:
    """A site's pattern and its roles' rows of matrices, named as its module names them."""
    return _rows(site.pattern, {role: replace(r, parameter=_within(path, r)) for role, r in site.roles.items()})


def _within(path: str, role: Role) -> str:
    return role.parameter.removeprefix(f"{path}.") if path else role.parameter


def _rows(pattern: str, roles: Mapping[str, Role]) -> object:
    return pattern, frozenset(roles.items())


def _footprints(path: str, graph: Graph, sites: Sequence[Site], patterns: Sequence[Pattern]) -> dict[object, Footprint]:
    """Pattern and rows of matrices → where it stands, in the graph of one module."""
    matcher = Matcher(graph)
    found: dict[object, Footprint] = {}
    nearly = {
        (site.pattern, frozenset((role, _within(path, r)) for role, r in site.roles.items()))
        for site in sites
        if site.is_approximated
    }
    for pattern in patterns:
        for match in matcher.find(pattern)[0]:
            try:
                sketch = outline(graph, match)
                footprint = locate(sketch, approximates=_weights(pattern.name, sketch) in nearly)
            except LayoutError:
                continue
            found.setdefault(_rows(pattern.name, roles_of(sketch, footprint.one)), footprint)
    return found


def _assembled(path: str, graph: Graph, placed: Iterable[Placed]) -> SiteModule:
    """A module with the features of all its sites followed together."""
    chosen = tuple(placed)
    linears = [linear for one in chosen for linear in one.footprint.outline.producers.values()]
    starts, offsets, count = starts_of(linears)
    region = sorted({node for one in chosen for node in one.footprint.outline.region}, key=graph.place)
    flow = follow(region, starts, count, approximates=any(one.site.is_approximated for one in chosen))
    producers = {linear.weight: linear for linear in linears}
    return SiteModule(path, graph.trace, graph, chosen, producers, offsets, tuple(region), flow)


def _weights(pattern: str, sketch: Outline) -> object:
    return pattern, frozenset((role, linear.weight) for role, linear in sketch.linears.items())


def _moved(known: SiteModule, path: str, module: nn.Module, call: Call, sites: Sequence[Site]) -> SiteModule:
    """The same trace for another module that looks alike."""
    layers = iter(call.cache_layers)
    calls = tuple(
        replace(said, layer=next(layers)) if isinstance(said, CacheCall) else said for said in known.trace.calls
    )
    trace = replace(known.trace, module=module, call=call, calls=calls)
    placed = tuple(replace(old, site=site) for old, site in zip(known.placed, sites, strict=True))
    return replace(known, path=path, trace=trace, graph=replace(known.graph, trace=trace), placed=placed)
