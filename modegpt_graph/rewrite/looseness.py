"""Whether fits do better on other text as if features went less together: tried on the other text.

How features go together differs from text to text more than how large they are, but not in every model: in one whose
features are few in truth, they go together whatever it reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from modegpt_graph.allocate.budget import Item
from modegpt_graph.calibrate.observe import Calibrated
from modegpt_graph.calibrate.statistics import ConsumerStatistics
from modegpt_graph.match.modules import Placed, SiteModule
from modegpt_graph.rewrite.kinds import Kind, kinds_of, tried
from modegpt_graph.rewrite.problem import Solver, consumer_error, consumer_problem
from modegpt_graph.rewrite.ranks import half_ranks

SHRINKAGE = 0.5  # the best of 0.03 to 0.7 for other text


@dataclass(frozen=True)
class Looseness:
    """One kind of site. ratio: error on the other text of fits to the calibration text alone, as if features went less
    together, over that of plain fits; at half rank.

    measured: how many of `sites` sites were.
    """

    kind: Kind
    sites: int
    measured: int
    ratio: float

    @property
    def helps(self) -> bool:
        """Whether fits do better so."""
        return self.ratio < 1

    @property
    def said(self) -> str:
        """The choice in a sentence."""
        start = f"as if features went together {SHRINKAGE:g} times as much" if self.helps else "as features go together"
        return (
            f"Recalibration of {self.kind[0]} starts {start}: looser fits to the calibration text err "
            f"{self.ratio:.2f} times as much as plain ones on the other text, at {self.measured} of "
            f"{self.sites} sites."
        )


def observed_beside(
    observed: Calibrated, other: Tensor | None, modules: Sequence[SiteModule], run: Callable[[Tensor], Calibrated]
) -> Calibrated:
    """What was observed on the calibration text and on another, if there is one: apart too at the sites that
    `try_looseness` tries.
    """
    if other is None:
        return observed
    sites = [placed.site.id for alike in kinds_of(modules, _is_consumer).values() for placed in tried(alike)]
    return observed.with_other(run(other), sites)


def try_looseness(
    model: nn.Module,
    modules: Sequence[SiteModule],
    items: Sequence[Item],
    observed: Calibrated,
    solver: Callable[[Placed, ConsumerStatistics, float], Solver],
) -> Mapping[Kind, Looseness]:
    """What is found for each kind of site; empty where there was one text alone.

    solver: from a site, its statistics and a shrinkage.
    """
    paths = {placed.site.id: one.path for one in modules for placed in one.placed}
    ranks, found = half_ranks(items), {}
    for kind, alike in kinds_of(modules, _is_consumer).items():
        some = [placed for placed in tried(alike) if placed.site.id in observed.other]
        if not some:
            continue
        lost = {0.0: 0.0, SHRINKAGE: 0.0}
        for placed in some:
            site, layout = placed.site.id, placed.footprint.layout
            both, other = observed.statistics[site], observed.other[site]
            assert isinstance(both, ConsumerStatistics)
            assert isinstance(other, ConsumerStatistics)
            ((role, linear),) = placed.footprint.outline.consumers.items()
            problem = consumer_problem(model.get_submodule(paths[site]), linear, layout, role, other.gram)
            for shrinkage in lost:
                solution = solver(placed, replace(both, gram=both.gram - other.gram), shrinkage).solution(ranks[site])
                lost[shrinkage] += consumer_error(problem, layout, solution)
        plain, looser = lost.values()
        found[kind] = Looseness(kind, len(alike), len(some), looser / plain if plain > 0 else 1.0)
    return found


def _is_consumer(placed: Placed) -> bool:
    outline = placed.footprint.outline
    return len(outline.consumers) == 1 and outline.experts is None
