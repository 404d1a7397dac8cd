"""From a traced model to its sites: every pattern matched, every site certified, every other matrix explained."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from modegpt_graph.errors import ModegptError
from modegpt_graph.flow.layout import Layout, LayoutError, rows_to_ranges
from modegpt_graph.match.approximate import approximated, describe
from modegpt_graph.match.certify import certify
from modegpt_graph.match.claims import admitted_method, counterexample
from modegpt_graph.match.commutant import Finding, find_commutant
from modegpt_graph.match.decoder import common_path, decoder_matrices
from modegpt_graph.match.footprint import Footprint, Outline, locate, outline
from modegpt_graph.match.matcher import Match, Matcher, Miss
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.place import place_of
from modegpt_graph.match.products import attention_graph
from modegpt_graph.match.reasons import decide, refusal
from modegpt_graph.match.sites import Analysis, Certificate, ModelFacts, Role, Site, SiteType
from modegpt_graph.match.unmatched import explain, is_multiplied
from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.graph import Graph

TYPES: tuple[SiteType, ...] = ("III", "I", "II")


@dataclass(frozen=True)
class Located:
    """A site with what later stages need of it: its outline in the traced graph, and its layout where it has one.

    The experts of one tensor are one site here: they are traced, solved and rewritten together.
    """

    site: Site
    outline: Outline
    layout: Layout | None


@dataclass(frozen=True)
class Survey:
    """The analysis of a model, and its sites with their layouts."""

    analysis: Analysis
    located: tuple[Located, ...]


@dataclass(frozen=True)
class _Examined:
    layout: Layout | None
    finding: Finding | None
    certificate: Certificate
    obstacle: str | None
    counterexample: str | None = None
    approximation: str | None = None


def survey(
    trace: Trace, patterns: Sequence[Pattern], name: str, architecture: str, *, approximate_norm: bool = False
) -> Survey:
    """Find every site of a traced model.

    approximate_norm: whether query/key under a norm of each head is taken, by an approximation, instead of refused.
    Raises ModegptError where the model has no decoder-layer matrices.
    """
    graph = attention_graph(trace)
    matrices = decoder_matrices(trace)
    if not matrices:
        raise ModegptError(f"{name}: no decoder-layer weight matrix was found in the traced graph")
    matcher = Matcher(graph)
    matches: list[Match] = []
    misses: list[Miss] = []
    for pattern in patterns:
        found, missed = matcher.find(pattern)
        matches += found
        misses += missed
    located = _sites(graph, matches, matrices, approximate_norm)
    return Survey(_analysis(graph, located, misses, matrices, name, architecture), tuple(located))


def _sites(
    graph: Graph, matches: Iterable[Match], matrices: Mapping[str, int], approximate_norm: bool
) -> list[Located]:
    examined: dict[object, _Examined] = {}
    taken: dict[str, list[_Part]] = {}
    located: list[Located] = []
    identities: set[str] = set()
    groups: dict[object, list[tuple[Outline, _Examined]]] = {}
    for match in matches:
        weights = {role: linear.weight for role, key in match.linears.items() if (linear := graph.linear(key))}
        if all(weight in matrices for weight in weights.values()):
            sketch = outline(graph, match)
            signature = sketch.signature()
            if signature not in examined:
                examined[signature] = _examine(sketch, approximate_norm)
            # Matches of one pattern on the same rows of the same matrices are one site, used more than once.
            roles = roles_of(sketch, examined[signature].layout)
            groups.setdefault((match.pattern.name, *roles.items()), []).append((sketch, examined[signature]))
    # A site whose rows are not known claims whole matrices: it comes last, and takes what no other site has.
    for group in sorted(groups.values(), key=lambda group: _claim(*group[0])):
        sketch, result = group[0]
        obstacle = _used_otherwise(graph, group)
        if obstacle is not None:
            result = _Examined(None, None, Certificate("structural", None, False), obstacle)
        roles = roles_of(sketch, result.layout)
        parts = {role: _part_of(sketch, result.layout, role, roles[role].rows) for role in roles}
        if any(_overlap(part, taken.get(roles[role].parameter, ())) for role, part in parts.items()):
            continue
        for role, part in parts.items():
            taken.setdefault(roles[role].parameter, []).append(part)
        layer = min(matrices[role.parameter] for role in roles.values())
        identity = _identity(sketch.match.pattern.name, roles, identities)
        located.append(Located(_site(identity, sketch, result, roles, layer), sketch, result.layout))
    return sorted(located, key=lambda one: (one.site.layer, graph.place(one.outline.end)))


def _claim(sketch: Outline, result: _Examined) -> tuple[int, int]:
    """Order in which sites claim their matrices: those that are taken, those that are refused, those not known.

    Of those whose rows are not known, the largest first.
    """
    if result.layout is None or result.finding is None:
        model = sketch.graph.trace.module
        return 2, -sum(model.get_parameter(linear.weight).numel() for linear in sketch.linears.values())
    method = admitted_method(sketch.match.pattern.decomposition, result.finding.commutant)
    is_taken = result.approximation is not None or (method is not None and result.certificate.holds)
    return 0 if is_taken else 1, 0


def _used_otherwise(graph: Graph, group: Sequence[tuple[Outline, _Examined]]) -> str | None:
    """What is against a site whose matrices are multiplied more often than once, None where each time is alike."""
    for role, linear in group[0][0].linears.items():
        nodes = {sketch.linears[role].node for sketch, _ in group}
        if len(nodes) != len(graph.linears[linear.weight]):
            return "one of its matrices is also used elsewhere"
        for parameter in filter(None, (linear.weight, linear.bias)):
            reader = graph.other_reader(parameter, linear.weight)
            if reader is not None:
                return f"`{parameter}` is also read by {place_of(reader)}, as a value of its own"
    if not all(_same(group[0][1], result) for _, result in group):
        return "its matrices are used more than once, and not in the same way each time"
    return None


def _same(one: _Examined, other: _Examined) -> bool:
    """Whether a site may be changed in the same ways on two of its uses."""
    if one is other:
        return True
    if one.layout is None or other.layout is None or one.finding is None or other.finding is None:
        return False
    return (
        one.layout.equals(other.layout)
        and one.finding.commutant == other.finding.commutant
        and one.finding.between == other.finding.between
        and one.certificate.holds == other.certificate.holds
        and one.approximation == other.approximation
    )


def _examine(sketch: Outline, approximate_norm: bool) -> _Examined:
    try:
        footprint = locate(sketch)
        finding = find_commutant(footprint)
        certificate, probe = certify(footprint, finding)
    except LayoutError as error:
        return _Examined(None, None, Certificate("structural", None, False), str(error))
    except (RuntimeError, LookupError, TypeError, ValueError, NotImplementedError) as error:
        # An operation whose arguments are of a form that its rule does not know proves nothing: the site is refused.
        said = (
            f"its features could not be followed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
        return _Examined(None, None, Certificate("structural", None, False), said)
    if approximate_norm and finding.commutant == "none" and not sketch.consumers:
        try:
            nearly, known = approximated(sketch)
        except LayoutError as error:
            refuted = _refuted(footprint, finding, certificate)
            return _Examined(footprint.one, finding, certificate, str(error), refuted)
        exact = replace(finding, block_size=known.block_size)
        certificate = Certificate("structural", None, False)
        return _Examined(nearly.one, exact, certificate, None, None, describe(known, finding))
    return _Examined(footprint.one, finding, certificate, probe.obstacle, _refuted(footprint, finding, certificate))


def _refuted(footprint: Footprint, finding: Finding, certificate: Certificate) -> str | None:
    """What refutes the claim of a pattern at a site, None where it holds."""
    decomposition = footprint.outline.match.pattern.decomposition
    method = admitted_method(decomposition, finding.commutant)
    if method is not None and certificate.holds:
        return None
    return counterexample(footprint, method or decomposition.method)


def roles_of(sketch: Outline, layout: Layout | None) -> dict[str, Role]:
    """The rows of its matrices that a site has: all of them, where its layout is not known."""
    roles = {}
    for role, linear in sketch.linears.items():
        rows, _ = linear.shape(tuple(sketch.graph.trace.module.get_parameter(linear.weight).shape))
        selected = role in sketch.producers and layout is not None
        step = rows if linear.experts is not None else 0
        roles[role] = Role(linear.weight, _ranges_of(layout, role) if selected else ((0, rows),), step)
    return roles


@lru_cache(maxsize=64)
def _ranges_of(layout: Layout, role: str) -> tuple[tuple[int, int], ...]:
    """Rows of a selected role, columns of a refitted one; equal layers share their layout."""
    return rows_to_ranges(layout.members[role].reshape(-1).sort().values)


@dataclass(frozen=True)
class _Part:
    """Rows and columns of a matrix that a site has: some rows and all columns, or all rows and some columns."""

    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return _length(self.rows) * _length(self.columns)


def _part_of(sketch: Outline, layout: Layout | None, role: str, rows: tuple[tuple[int, int], ...]) -> _Part:
    linear = sketch.linears[role]
    _, columns = linear.shape(tuple(sketch.graph.trace.module.get_parameter(linear.weight).shape))
    some = role in sketch.consumers and layout is not None
    return _Part(rows, _ranges_of(layout, role) if some else ((0, columns),))


def _length(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def _overlap(part: _Part, taken: Iterable[_Part]) -> bool:
    return any(_meet(part.rows, other.rows) and _meet(part.columns, other.columns) for other in taken)


def _meet(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> bool:
    return any(start < stop_other and start_other < stop for start, stop in first for start_other, stop_other in second)


def _identity(pattern: str, roles: Mapping[str, Role], identities: set[str]) -> str:
    """Module path and pattern; a number where that is not unique."""
    base = f"{common_path(role.parameter for role in roles.values())}:{pattern}"
    identity, number = base, 2
    while identity in identities:
        identity, number = f"{base}-{number}", number + 1
    identities.add(identity)
    return identity


def _site(identity: str, sketch: Outline, result: _Examined, roles: Mapping[str, Role], layer: int) -> Site:
    pattern, layout, finding = sketch.match.pattern, result.layout, result.finding
    if finding is None or layout is None:
        return Site(
            identity,
            pattern.name,
            sketch.match.variant,
            pattern.paper_type or "I",
            pattern.paper_type or "I",
            roles,
            (),
            0,
            "none",
            None,
            result.certificate,
            None,
            refusal(result.obstacle),
            layer,
            1,
            0,
            sketch.copies,
        )
    if result.approximation is not None:
        method, reason = "cr", result.approximation
    else:
        method, reason = decide(pattern, finding, layout, result.certificate, result.obstacle, result.counterexample)
        if finding.commutant == "none" and result.obstacle is not None:
            reason += f"; not approximated: {result.obstacle}"
    kind = TYPES[min(finding.nonlinearities, 2)]
    return Site(
        id=identity,
        pattern=pattern.name,
        variant=sketch.match.variant,
        type=kind,
        paper_type=pattern.paper_type or kind,
        roles=roles,
        between=finding.between,
        nonlinearities=finding.nonlinearities,
        commutant=finding.commutant,
        block_size=finding.block_size,
        certificate=result.certificate,
        decomposition=method,
        reason=reason,
        layer=layer,
        groups=layout.groups,
        full_rank=layout.size,
        copies=sketch.copies,
    )


def _analysis(
    graph: Graph,
    located: Sequence[Located],
    misses: Sequence[Miss],
    matrices: Mapping[str, int],
    name: str,
    architecture: str,
) -> Analysis:
    model = graph.trace.module
    sizes = {name: model.get_parameter(name).numel() for name in matrices if is_multiplied(graph, name)}
    in_sites = {role.parameter for one in located for role in one.site.roles.values()}
    unmatched = tuple(explain(graph, matrix, misses, in_sites) for matrix in matrices if matrix not in in_sites)
    facts = ModelFacts(name, architecture, sum(p.numel() for p in model.parameters()), sum(sizes.values()))
    covered = sum(map(_covered, located))
    sites = tuple(site for one in located for site in one.site.apart())
    return Analysis(facts, sites, unmatched, covered / max(sum(sizes.values()), 1))


def _covered(located: Located) -> int:
    """Parameters of the matrices that belong to a site; a matrix that has two roles is counted once."""
    parts: dict[str, dict[_Part, int]] = {}
    for role, linear in located.outline.linears.items():
        part = _part_of(located.outline, located.layout, role, located.site.roles[role].rows)
        parts.setdefault(linear.weight, {})[part] = linear.copies * part.size
    model = located.outline.graph.trace.module
    return sum(min(sum(own.values()), model.get_parameter(weight).numel()) for weight, own in parts.items())
