"""The sites of a model, found again in the smallest modules that hold them, to be observed and rewritten there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch.utils._pytree as pytree
from torch import fx, nn

from modegpt_graph.errors import ModegptError
from modegpt_graph.flow.labels import Flow, follow
from modegpt_graph.flow.layout import LayoutError
from modegpt_graph.match.analyse import Survey
from modegpt_graph.match.decoder import common_path
from modegpt_graph.match.footprint import Footprint, locate, outline, starts_of
from modegpt_graph.match.matcher import Matcher
from modegpt_graph.match.patterns import Pattern
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
    Raises ModegptError where a site of the whole model is not found again in its module.
    """
    groups: dict[str, list[Site]] = {}
    for one in survey.located:
        if one.site.decomposition is not None:
            groups.setdefault(_module_of(one.site), []).append(one.site)
    calls = record_calls(skeleton, groups, example_inputs)
    if not groups:
        return ()
    outer = survey.located[0].outline.graph
    known: dict[object, SiteModule] = {}
    modules = []
    for path, sites in groups.items():
        module = skeleton.get_submodule(path)
        key = (_structure(outer, path), type(module), _shape_of(calls[path]), tuple(_relative(path, s) for s in sites))
        if key not in known:
            known[key] = _trace_module(path, module, calls[path], sites, patterns)
        modules.append(_moved(known[key], path, module, calls[path], sites))
    return tuple(modules)


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


def _structure(graph: Graph, path: str) -> object:
    """The operations of one module in the whole model's trace, with what they are given, free of names."""
    wanted = f"module.{path}"
    places: dict[fx.Node, int] = {}
    lines = []

    def place(node: fx.Node) -> str:
        return f"%{places.setdefault(node, len(places))}"

    for node in graph.trace.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if any(where == wanted for where, _ in stack.values()):
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
