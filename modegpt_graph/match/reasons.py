"""What is done with a site, and why, in a sentence that a person can act on."""

from collections.abc import Sequence

from modegpt_graph.flow.layout import Layout
from modegpt_graph.match.commutant import Finding
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.sites import Certificate, Method


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else list(names))


def refusal(obstacle: str | None) -> str:
    """Reason of a site whose features could not be followed."""
    return f"refused: {obstacle}"


def decide(
    pattern: Pattern, finding: Finding, layout: Layout, certificate: Certificate, obstacle: str | None
) -> tuple[Method | None, str]:
    """(decomposition, reason) of a site."""
    if finding.commutant == "none":
        what = listed(finding.coupled_by or finding.between) or "what stands between the matrices"
        return None, f"refused: {what}: every feature depends on the others, so none can be dropped alone"
    if not certificate.holds:
        if obstacle is not None:
            return None, f"refused: the probe could not be run: {obstacle}"
        return None, f"refused: the probe found a deviation of {certificate.max_error:.1e} after dropping features"
    known = "" if finding.proven else f" (probed, not proven: what {listed(finding.unknown)} does is not known)"
    if finding.commutant == "linear":
        return "svd", f"nothing between the matrices limits how features are mixed: the SVD is optimal{known}"
    steps = [name for name in finding.between if name != "mix"]
    between, many = listed(steps), len(steps) > 1
    if finding.commutant == "columns":
        method: Method = "cr" if pattern.decomposition.method == "cr" else "nystrom"
        together = "together are one function of each feature" if many else "acts on each feature alone"
        return method, f"{between} {together}: any columns may be kept{known}"
    rest = next((kind for kind in layout.kinds if kind.block_size == 1), None)
    free = f"; the other {rest.count} features of a head are free" if rest is not None else ""
    couples = "couple" if many else "couples"
    return pattern.decomposition.method, (
        f"{between} {couples} features in blocks of {finding.block_size}: whole blocks are kept{free}{known}"
    )
