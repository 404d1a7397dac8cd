"""The sites of a model, found again in the smallest modules that hold them, to be observed and rewritten there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from modegpt_graph.errors import ModegptError
from modegpt_graph.flow.labels import Flow, follow
from modegpt_graph.flow.layout import LayoutError
from modegpt_graph.flow.shrink import Selection, shrink
from modegpt_graph.match.analyse import Survey
from modegpt_graph.match.decoder import common_path
from modegpt_graph.match.footprint import Footprint, locate, outline, starts_of
from modegpt_graph.match.matcher import Matcher
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.probe import random_blocks, selection_of
from modegpt_graph.match.sites import Site
from modegpt_graph.trace.calls import Call, record_calls
from modegpt_graph.trace.export import Trace, export
from modegpt_graph.trace.graph import Graph, normalise
from modegpt_graph.trace.linear import Linear
from modegpt_graph.trace.opaque import AttentionCall, CacheCall
from modegpt_graph.trace.operations import operation


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


def site_modules(
    skeleton: nn.Module, survey: Survey, patterns: Sequence[Pattern], example_inputs: tuple | None = None
) -> tuple[SiteModule, ...]:
    """Trace the smallest module of every site that can be decomposed, once for all modules that look alike.

    skeleton: the model on the meta device.
    A module whose forward method is written anew runs what is within it as it was traced: modules within it that are
    written anew too are one with it, and so are those that change rows of the same matrix.
    Raises ModegptError where a site of the whole model is not found again in its module.
    """
    groups: dict[str, list[Site]] = {}
    for one in survey.located:
        if one.site.decomposition is not None:
            groups.setdefault(_module_of(one.site), []).append(one.site)
    if not groups:
        return ()
    tracer = _Tracer(skeleton, survey, patterns, record_calls(skeleton, groups, example_inputs))
    order = {one.site.id: number for number, one in enumerate(survey.located)}
    modules: dict[str, SiteModule] = {}
    for path in sorted(groups, key=lambda path: path.count(".") + bool(path)):  # the outer ones first
        if path not in groups:
            continue
        within = [other for other in groups if other != path and (not path or other.startswith(f"{path}."))]
        sites = groups[path]
        while joined := [other for other in within if _parameters(sites) & _parameters(groups.get(other, ()))]:
            sites = [*sites, *(site for other in joined for site in groups.pop(other))]
        if any(other in groups for other in within) and tracer.is_written_anew(path, sites):
            anew = [other for other in within if other in groups and tracer.is_written_anew(other, groups[other])]
            sites = [*sites, *(site for other in anew for site in groups.pop(other))]
        groups[path] = sorted(sites, key=lambda site: order[site.id])
        modules[path] = tracer.traced(path, groups[path])
    return tuple(modules[path] for path in groups)


class _Tracer:
    """Traces modules, once for all that look alike."""

    def __init__(
        self, skeleton: nn.Module, survey: Survey, patterns: Sequence[Pattern], calls: Mapping[str, Call]
    ) -> None:
        self._skeleton, self._patterns, self._calls = skeleton, patterns, calls
        self._structures = _structures(survey.located[0].outline.graph, calls)
        self._known: dict[object, SiteModule] = {}
        self._anew: dict[object, bool] = {}

    def traced(self, path: str, sites: Sequence[Site]) -> SiteModule:
        """A module with its sites in it."""
        module, call, key = self._skeleton.get_submodule(path), self._calls[path], self._key(path, sites)
        if key not in self._known:
            self._known[key] = _trace_module(path, module, call, sites, self._patterns)
        return _moved(self._known[key], path, module, call, sites)

    def is_written_anew(self, path: str, sites: Sequence[Site]) -> bool:
        """Whether a module needs another forward method, to be observed or for fewer features."""
        key = self._key(path, sites)
        if key not in self._anew:
            self._anew[key] = _is_written_anew(self.traced(path, sites))
        return self._anew[key]

    def _key(self, path: str, sites: Sequence[Site]) -> object:
        kind = type(self._skeleton.get_submodule(path))
        relative = tuple(_relative(path, site) for site in sites)
        return self._structures[path], kind, _shape_of(self._calls[path]), relative


def _parameters(sites: Sequence[Site]) -> set[str]:
    return {role.parameter for site in sites for role in site.roles.values()}


def _is_written_anew(one: SiteModule) -> bool:
    if any(placed.site.is_approximated or observed_input(one, placed.footprint) is None for placed in one.placed):
        return True
    generator = torch.Generator().manual_seed(0)
    chosen = [
        selection_of(
            p.footprint.one, random_blocks(p.footprint.one, generator), labels_of(one, p), one.flow.classes.count
        )
        for p in one.placed
    ]
    return not shrink(one.region, one.flow, Selection.merged(chosen, one.flow.classes.count)).empty


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


def _relative(path: str, site: Site) -> tuple[object, ...]:
    return site.pattern, tuple((role, r.parameter.removeprefix(f"{path}."), r.rows) for role, r in site.roles.items())


def _shape_of(call: Call) -> tuple[object, ...]:
    tensors = tuple((tuple(t.shape), t.dtype) for t in call.tensors)
    leaves = pytree.tree_leaves(dict(call.arguments), is_leaf=lambda leaf: not isinstance(leaf, (dict, list, tuple)))
    return tensors, call.dynamic, tuple(call.arguments), tuple(map(_plain, leaves)), len(call.cache_layers)


def _plain(leaf: object) -> object:
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf).__name__


def _structures(graph: Graph, paths: Iterable[str]) -> dict[str, object]:
    """Module → its operations in the whole model's trace, with what they are given, free of names."""
    wanted = {f"module.{path}" if path else "module": path for path in paths}
    nodes: dict[str, list[fx.Node]] = {path: [] for path in wanted.values()}
    for node in graph.trace.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for where in {where for where, _ in stack.values()} & wanted.keys():
            nodes[wanted[where]].append(node)
    return {path: _said(graph, own) for path, own in nodes.items()}


def _said(graph: Graph, nodes: Sequence[fx.Node]) -> object:
    places: dict[fx.Node, int] = {}

    def place(node: fx.Node) -> str:
        return f"%{places.setdefault(node, len(places))}"

    lines = []
    for node in nodes:
        args = node.args
        if operation(node) == "attention":
            said = graph.trace.calls[args[-1]]
            assert isinstance(said, AttentionCall)
            args = (*args[:-1], said.scaling, said.tensors, str(dict(said.constants)), said.passed_through)
        lines.append((place(node), str(node.target), str(fx.map_arg((args, node.kwargs), place))))
    return tuple(lines)


def _matrices(path: str, site: Site) -> tuple[str, frozenset[tuple[str, str]]]:
    """A site's pattern and its roles' matrices, named as its module names them."""
    return site.pattern, frozenset((role, r.parameter.removeprefix(f"{path}.")) for role, r in site.roles.items())


def _trace_module(
    path: str, module: nn.Module, call: Call, sites: Sequence[Site], patterns: Sequence[Pattern]
) -> SiteModule:
    trace = export(module, call)
    graph = normalise(trace)
    matcher = Matcher(graph)
    found: dict[object, Footprint] = {}
    nearly = {_matrices(path, site) for site in sites if site.is_approximated}
    for pattern in patterns:
        for match in matcher.find(pattern)[0]:
            weights = {role: linear.weight for role, key in match.linears.items() if (linear := graph.linear(key))}
            key = pattern.name, frozenset(weights.items())
            try:
                footprint = locate(outline(graph, match), approximates=key in nearly)
            except LayoutError:
                continue
            found.setdefault(key, footprint)
    placed = []
    for site in sites:
        footprint = found.get(_matrices(path, site))
        if footprint is None:
            raise ModegptError(f"{site.id}: found in the whole model but not in {path} on its own")
        placed.append(Placed(site, footprint))
    linears = [linear for one in placed for linear in one.footprint.outline.producers.values()]
    starts, offsets, count = starts_of(linears)
    region = sorted({node for one in placed for node in one.footprint.outline.region}, key=graph.place)
    flow = follow(region, starts, count, approximates=bool(nearly))
    return SiteModule(
        path, trace, graph, tuple(placed), {linear.weight: linear for linear in linears}, offsets, tuple(region), flow
    )


def _moved(known: SiteModule, path: str, module: nn.Module, call: Call, sites: Sequence[Site]) -> SiteModule:
    """The same trace for another module that looks alike."""
    layers = iter(call.cache_layers)
    calls = tuple(
        replace(said, layer=next(layers)) if isinstance(said, CacheCall) else said for said in known.trace.calls
    )
    trace = replace(known.trace, module=module, call=call, calls=calls)
    placed = tuple(replace(old, site=site) for old, site in zip(known.placed, sites, strict=True))
    return replace(known, path=path, trace=trace, graph=replace(known.graph, trace=trace), placed=placed)
