"""What one pattern meets in a model: its sites, and how near it came everywhere else."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from modegpt_graph.match.decoder import decoder_matrices
from modegpt_graph.match.matcher import Matcher, Miss
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.prepare import survey_model
from modegpt_graph.match.products import attention_graph
from modegpt_graph.match.sites import Site
from modegpt_graph.models import ModelSource
from modegpt_graph.progress import Progress


@dataclass(frozen=True)
class NearMiss:
    """A form that did not stand, at places where what stopped it is alike but for the numbers in its names.

    places: the matrix (or operation) that the formula's first word was tried on.   miss: what stopped it at the first.
    """

    places: tuple[str, ...]
    miss: Miss


@dataclass(frozen=True)
class Meeting:
    """sites: where the pattern stands, refused or not.   misses: the other places, the nearest first."""

    pattern: Pattern
    sites: tuple[Site, ...]
    misses: tuple[NearMiss, ...]


def meet(source: ModelSource, pattern: Pattern, progress: Progress | None = None) -> Meeting:
    """Look for one pattern, and no other, in a model. No weights are read."""
    surveyed = survey_model(source, [pattern], progress)
    sites = surveyed.survey.analysis.sites
    graph = attention_graph(surveyed.trace)
    taken = {role.parameter for site in sites for role in site.roles.values()}
    matrices = decoder_matrices(surveyed.trace)
    left = []
    for miss in Matcher(graph).find(pattern)[1]:
        linear = graph.linear(miss.start)
        if linear is None or (linear.weight in matrices and linear.weight not in taken):
            left.append((miss.start if linear is None else linear.weight, miss))
    return Meeting(pattern, sites, _folded(left))


def _folded(misses: Iterable[tuple[str, Miss]]) -> tuple[NearMiss, ...]:
    groups: dict[str, list[tuple[str, Miss]]] = {}
    for place, miss in misses:
        groups.setdefault(_unnumbered(str(miss)), []).append((place, miss))
    folded = [NearMiss(tuple(place for place, _ in found), found[0][1]) for found in groups.values()]
    return tuple(sorted(folded, key=lambda one: -one.miss.matched))


def _unnumbered(text: str) -> str:
    return re.sub(r"(?<=[._])\d+(?=\b|\.)", "*", text)
