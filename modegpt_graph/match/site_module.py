"""A module with sites in it: their features followed together, in one graph, and where they are seen."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from modegpt_graph.flow.kept import follow_kept, kept_in
from modegpt_graph.flow.labels import Flow
from modegpt_graph.flow.layout import LayoutError
from modegpt_graph.flow.shrink import Edits, Selection, shrink
from modegpt_graph.match.analyse import roles_of
from modegpt_graph.match.footprint import Footprint, Outline, locate, outline, starts_of
from modegpt_graph.match.matcher import Matcher
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.probe import random_blocks, selection_of
from modegpt_graph.match.sites import Role, Site
from modegpt_graph.trace.calls import Call
from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.graph import Graph
from modegpt_graph.trace.linear import Linear
from modegpt_graph.trace.opaque import CacheCall
from modegpt_graph.trace.stores import stores_of


@dataclass(frozen=True)
class Placed:
    """A site within its module: the same features, in the graph of the module as the model calls it.

    again: where the module uses it once more.
    """

    site: Site
    footprint: Footprint
    again: tuple[Footprint, ...] = ()

    @property
    def uses(self) -> tuple[Footprint, ...]:
        """Every use of the site."""
        return self.footprint, *self.again


@dataclass(frozen=True)
class SiteModule:
    """One module, traced as the model calls it, with the sites in it.

    path: in the model.   producers: weight name in the module → the product with it, for every selected role.
    flow: features of all sites followed together; offsets: weight name → its first label.
    forks: the other ways that calls take through the module, each with the condition on its arguments that tells it.
    """

    path: str
    trace: Trace
    graph: Graph
    placed: tuple[Placed, ...]
    producers: Mapping[str, Linear]
    offsets: Mapping[str, int]
    region: tuple[fx.Node, ...]
    flow: Flow
    forks: tuple[tuple[str, "SiteModule"], ...] = ()


def halved(one: SiteModule) -> Edits:
    """What changes in a module when every site keeps half of its blocks, in another order."""
    generator = torch.Generator().manual_seed(0)
    count = one.flow.classes.count
    chosen = [
        selection_of(p.footprint.one, random_blocks(p.footprint.one, generator), labels_of(one, p), count)
        for p in one.placed
    ]
    return shrink(one.region, one.flow, Selection.merged(chosen, count))


def is_written_anew(one: SiteModule, edits: Edits) -> bool:
    """Whether a module needs another forward method, to be observed or for fewer features. edits: what changes then."""
    observed = any(p.site.is_approximated or observed_input(one, p.footprint) is None for p in one.placed)
    return observed or not edits.empty


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


def kept_of(one: SiteModule) -> dict[str, tuple[fx.Node, Tensor]]:
    """Path of every tensor that keeps features of the sites from call to call → (its node, its labels)."""
    found = kept_in(one.flow, stores_of(one.trace.graph))
    return {one.trace.state[node.name]: (node, labels) for node, labels in found.items()}


def keeps_otherwise(one: SiteModule, other: SiteModule) -> list[str]:
    """Paths of what keeps features on one way through a module, and on another reads or keeps others."""
    first, second = kept_of(one), kept_of(other)
    read = {
        other.trace.state[node.name]
        for node in other.trace.graph.nodes
        if node.name in other.trace.state and node.users
    }
    alike = one.offsets == other.offsets
    found = [path for path, (_, labels) in first.items() if path in second and not torch.equal(labels, second[path][1])]
    found += [path for path in first if path in read and (path not in second or not alike)]
    return [*found, *(path for path in second if path not in first)]


def labels_of(one: SiteModule, placed: Placed) -> dict[str, Tensor]:
    """Selected role → (G, g, d) labels of its rows, in the labels of the whole module."""
    producers = placed.footprint.outline.producers
    return {role: placed.footprint.one.members[role] + one.offsets[linear.weight] for role, linear in producers.items()}


def matrices_of(path: str, site: Site) -> object:
    """A site's pattern and its roles' rows of matrices, named as its module names them."""
    return _rows(site.pattern, {role: replace(r, parameter=_within(path, r)) for role, r in site.roles.items()})


def _within(path: str, role: Role) -> str:
    return role.parameter.removeprefix(f"{path}.") if path else role.parameter


def _rows(pattern: str, roles: Mapping[str, Role]) -> object:
    return pattern, frozenset(roles.items())


def are_all_uses(graph: Graph, uses: Sequence[Footprint]) -> bool:
    """Whether these are all uses of a site's matrices in a module, and the same features on each."""
    for role, linear in uses[0].outline.linears.items():
        nodes = {use.outline.linears[role].node for use in uses}
        if len(nodes) != len(graph.linears[linear.weight]):
            return False
    return all(use.one.equals(uses[0].one) for use in uses)


def find_footprints(
    path: str, graph: Graph, sites: Sequence[Site], patterns: Sequence[Pattern]
) -> dict[object, list[Footprint]]:
    """Pattern and rows of matrices → where it stands, in the graph of one module."""
    matcher = Matcher(graph)
    found: dict[object, list[Footprint]] = {}
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
            found.setdefault(_rows(pattern.name, roles_of(sketch, footprint.one)), []).append(footprint)
    return found


def assembled(path: str, graph: Graph, placed: Iterable[Placed]) -> SiteModule:
    """A module with the features of all its sites followed together."""
    chosen = tuple(placed)
    uses = [use for one in chosen for use in one.uses]
    linears = [linear for use in uses for linear in use.outline.producers.values()]
    starts, offsets, count = starts_of(linears)
    region = sorted({node for use in uses for node in use.outline.region}, key=graph.place)
    stores = tuple(dict.fromkeys(node for use in uses for node in use.outline.stores))
    nearly = any(one.site.is_approximated for one in chosen)
    flow = follow_kept(region, starts, count, stores, approximates=nearly)
    producers = {linear.weight: linear for linear in linears}
    return SiteModule(path, graph.trace, graph, chosen, producers, offsets, tuple(region), flow)


def _weights(pattern: str, sketch: Outline) -> object:
    return pattern, frozenset((role, linear.weight) for role, linear in sketch.linears.items())


def moved(known: SiteModule, path: str, module: nn.Module, call: Call, sites: Sequence[Site]) -> SiteModule:
    """The same trace for another module that looks alike."""
    layers = iter(call.cache_layers)
    calls = tuple(
        replace(said, layer=next(layers)) if isinstance(said, CacheCall) else said for said in known.trace.calls
    )
    trace = replace(known.trace, module=module, call=call, calls=calls)
    forks = tuple((condition, _placed_again(fork, path, module, sites)) for condition, fork in known.forks)
    return replace(_placed_again(known, path, module, sites, trace), forks=forks)


def _placed_again(
    known: SiteModule, path: str, module: nn.Module, sites: Sequence[Site], trace: Trace | None = None
) -> SiteModule:
    trace = replace(known.trace, module=module) if trace is None else trace
    placed = tuple(replace(old, site=site) for old, site in zip(known.placed, sites, strict=True))
    return replace(known, path=path, trace=trace, graph=replace(known.graph, trace=trace), placed=placed)
