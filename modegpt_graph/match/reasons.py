"""What is done with a site, and why, in a sentence that a person can act on."""

from collections.abc import Sequence

from modegpt_graph.flow.layout import Layout
from modegpt_graph.match.claims import CLAIMS, admitted_method
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
    pattern: Pattern,
    finding: Finding,
    layout: Layout,
    certificate: Certificate,
    obstacle: str | None,
    counterexample: str | None,
) -> tuple[Method | None, str]:
    """(decomposition, reason) of a site. counterexample: what refutes the pattern's claim, where one was found."""
    steps = [name for name in finding.between if name != "mix"]
    between, many = listed(steps), len(steps) > 1
    found = f"; found: {counterexample}" if counterexample else ""
    if finding.commutant == "none":
        what = listed(finding.coupled_by or finding.between) or "what stands between the matrices"
        return None, f"refused: {what}: every feature depends on the others, so none can be dropped alone{found}"
    method = admitted_method(pattern.decomposition, finding.commutant)
    if method is None:
        claimed = pattern.decomposition.method
        return None, f"refused: `{claimed}` claims that {CLAIMS[claimed]}, but {between} {_does(finding, many)}{found}"
    if not certificate.holds:
        if obstacle is not None:
            return None, f"refused: the probe could not be run: {obstacle}"
        return (
            None,
            f"refused: the probe found a deviation of {certificate.max_error:.1e} after dropping features{found}",
        )
    known = "" if finding.proven else f" (probed, not proven: what {listed(finding.unknown)} does is not known)"
    if finding.commutant == "linear":
        return method, f"nothing between the matrices limits how features are mixed: the SVD is optimal{known}"
    if finding.commutant == "columns":
        together = "together are one function of each feature" if many else "acts on each feature alone"
        return method, f"{between} {together}: any columns may be kept{known}"
    rest = next((kind for kind in layout.kinds if kind.block_size == 1), None)
    free = f"; the other {rest.count} features of a head are free" if rest is not None else ""
    return method, f"{between} {_does(finding, many)}: whole blocks are kept{free}{known}"


def _does(finding: Finding, many: bool) -> str:
    """What the operations in between do that limits the choice."""
    if finding.commutant == "blocks":
        return f"{'couple' if many else 'couples'} features in blocks of {finding.block_size}"
    return f"{'treat' if many else 'treats'} each feature in its own way"
