"""Certificates: the structural proof and the probe of a site, together."""

from modegpt_graph.match.commutant import Finding
from modegpt_graph.match.footprint import Footprint
from modegpt_graph.match.probe import Probe, probe_mixing, probe_selection
from modegpt_graph.match.sites import Certificate


def certify(footprint: Footprint, finding: Finding) -> tuple[Certificate, Probe]:
    """Certificate of a site's commutant.

    A site whose features are all coupled has nothing to prove: the structure alone says so. Where an operation is not
    in the table the probe decides; where the table and the probe disagree, the certificate does not hold.
    """
    if finding.commutant == "none":
        return Certificate("structural" if finding.proven else "probed", None, finding.proven), Probe(None, None)
    probe = probe_mixing(footprint) if finding.commutant == "linear" else probe_selection(footprint)
    if not finding.proven:
        return Certificate("probed", probe.max_error, probe.holds), probe
    return Certificate("both" if probe.obstacle is None else "structural", probe.max_error, probe.holds), probe
