"""The words and numbers a report uses, the same on the console and in HTML."""

import math
import shlex
from collections.abc import Mapping

from modegpt_graph.match.sites import Certificate, Site

METHODS = {"nystrom": "Nyström", "cr": "CR", "svd": "SVD"}

GLOSSARY = {
    "site": "Two or more weight matrices that can be made smaller together, and what stands between them.",
    "type": "Counted from what stands between the two matrices: type I has one nonlinear operation (an MLP), type II "
    "has two, one on each side of a product (queries and keys with rotary embedding), type III has none.",
    "commutant": "What may be done to the features between the matrices without the operations there noticing. It "
    "decides which decomposition is sound.",
    "linear": "Any mixing of features passes through unchanged, so the best low-rank pair (SVD) is allowed.",
    "columns": "Features are handled one by one, so any selection of them is allowed, but no mixing.",
    "blocks": "A few features are tied together (rotary embedding turns pairs), so whole blocks are kept or dropped.",
    "none": "All features depend on each other (a norm or a softmax over them), so nothing can be taken out.",
    "certificate": "How it is known that the commutant is right. Proved: every operation is in the table of known "
    "effects. Probed: the operations were run in float64 on random inputs with and without the selection; the error is "
    "the largest difference, relative to the largest output.",
    "Nyström": "Keeps the features with the highest ridge leverage score and refits the matrix that reads them.",
    "CR": "Keeps the features whose product of query and key norms is highest; the same ones on both sides.",
    "SVD": "Replaces the pair by the rank-k pair that is nearest on the calibration text; no selection beats it.",
    "rank": "Features that are kept in each group (attention head), of those there were.",
    "bound": "What propositions 1 to 3 of the method's paper allow an error to be at most, for the ridge, blocks and "
    "selection that were used. How far a bound is above its error tells how much the theory gives away.",
    "coverage": "Share of the decoder layers' weight-matrix parameters that belong to a site.",
}

OUTCOMES = ("rank", "bound")  # of the glossary, the words of a report on a compression


def count(number: int) -> str:
    """576, 49.2 k, 134.5 M, 6.74 B; exact below 10,000."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size and number >= 10_000:
            return f"{_short(number / size)} {unit}"
    return f"{number:,}"


def method_line(preset: str, allocator: str, seed: int) -> str:
    """preset paper, ranks by block-influence, seed 0; the default preset is not named."""
    return f"{'' if preset == 'default' else f'preset {preset}, '}ranks by {allocator}, seed {seed}"


def byte_count(number: int) -> str:
    """512 B, 23.0 kB, 538.1 MB: powers of 1000, as discs are sold."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{_short(number / size)} {unit}"
    return f"{number:,} B"


def percent(share: float) -> str:
    """30.0 %; 100 % and 0 % only where they are exact, so that nearly everything never reads as everything."""
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    return f"{min(max(share * 100, 0.1), 99.9):.1f} %" if 0 < share < 1 else f"{share * 100:.1f} %"


def seconds(value: float) -> str:
    """0.4 s, 12 s, 3 min 05 s."""
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def figure(value: float) -> str:
    """A measured value to four significant digits: 17.79, 0.6123, 1.2e+05."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:#.4g}".rstrip(".")
    return f"{value:.2g}"


def short_figure(value: float) -> str:
    """A measured value to two significant digits, where many stand side by side: 18, 0.61, 1.2e+05."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    return f"{value:,.0f}" if 10 <= abs(value) < 1e4 else f"{value:#.2g}".rstrip(".")


def plural(number: int, noun: str) -> str:
    """1 window, 12 windows; 2 matrices."""
    several = "matrices" if noun == "matrix" else noun + "s"
    return f"{number:,} {noun if number == 1 else several}"


def roles_line(site: Site) -> str:
    """`gate, up / down`: the matrices that give features, then the one that reads them, or `query / key`.

    The last role reads what the others give; the pattern file's order is kept.
    """
    *givers, reader = site.roles
    return f"{', '.join(givers)} / {reader}" if givers else reader


def commutant_line(site: Site) -> str:
    """`columns`, `blocks of 2`."""
    return f"blocks of {site.block_size}" if site.commutant == "blocks" and site.block_size else site.commutant


def decision(site: Site) -> str:
    """The decomposition's name, or `left alone`."""
    return METHODS[site.decomposition] if site.decomposition else "left alone"


def certificate_line(certificate: Certificate) -> str:
    """`proved and probed (error 2e-16)`, `probed, not proven (error 3e-16)`, `refuted by the probe (error 0.8)`."""
    error = "" if certificate.max_error is None else f" (error {_error(certificate.max_error)})"
    if not certificate.holds:
        return (
            "refuted by what the operations do" if certificate.method == "structural" else "refuted by the probe"
        ) + error
    return {"both": "proved and probed", "structural": "proved, not probed", "probed": "probed, not proven"}[
        certificate.method
    ] + error


def size_line(site: Site) -> str:
    """`11,008 features`, `8 heads of 128 features`."""
    if site.groups == 1:
        return plural(site.full_rank, "feature")
    return f"{site.groups:,} groups of {plural(site.full_rank, 'feature')}"


def type_line(site: Site) -> str:
    """`I`, or `III (paper II)` where the paper counts otherwise."""
    return site.type if site.type == site.paper_type else f"{site.type} (paper {site.paper_type})"


def time_line(seconds_by_stage: Mapping[str, float], forward_passes: float | None) -> str:
    """Total and stages, and what calibration cost in forward passes; empty where nothing was measured."""
    lines = []
    if seconds_by_stage:
        stages = ", ".join(f"{name} {_whole(value)}" for name, value in seconds_by_stage.items())
        lines.append(f"{seconds(sum(seconds_by_stage.values()))} in all; in seconds: {stages}.")
    if forward_passes is not None:
        lines.append(
            f"That is {forward_passes:.1f} plain forward passes over the calibration text, without evaluation."
        )
    return " ".join(lines)


def capital(text: str) -> str:
    """First letter large, the rest as it is; an identifier (`rms_norm`, `q.weight`) at the start stays as it is."""
    first = text.split(" ", 1)[0].rstrip(":,")
    return text[0].upper() + text[1:] if first.isalpha() and first.islower() else text


def sentence(text: str, *, start: bool = True) -> str:
    """The text with a full stop, and with a capital letter unless it continues a sentence."""
    text = text.strip()
    if start:
        text = capital(text)
    return text if not text or text[-1] in ".!?" else text + "."


def next_step(name: str, sites: int) -> str:
    """One line: what can be done with this analysis."""
    if not sites:
        return "No site can be made smaller as the patterns stand: the reasons above say what is in the way."
    quoted = shlex.quote(name)
    return f"modegpt-graph compress {quoted} --ratio 0.3 --out small"


def _whole(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def _error(value: float) -> str:
    return f"{value:.2g}" if value == 0 or value >= 0.01 else f"{value:.0e}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}"
