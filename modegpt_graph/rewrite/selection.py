"""How features are chosen: by leverage or by the surgeon, whichever does less to the logits at a few sites."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from modegpt_graph.allocate.budget import Item
from modegpt_graph.calibrate.memory import Memory
from modegpt_graph.match.modules import Placed, SiteModule
from modegpt_graph.progress import Progress
from modegpt_graph.rewrite.expected import NOISE
from modegpt_graph.rewrite.influence import influences
from modegpt_graph.rewrite.kinds import kinds_of, tried
from modegpt_graph.rewrite.problem import Solver
from modegpt_graph.rewrite.ranks import probe_tokens
from modegpt_graph.rewrite.solve import ConsumerColumns

CLEARLY = 0.8  # times the divergence: what does less for one site alone by a little may do more in company
TRIAL_ERROR = 0.02  # relative error at which the two are compared, or half of the features, whichever is less


@dataclass(frozen=True)
class Trial:
    """One kind of site. ratio: geometric mean of the divergence by the surgeon over that by leverage.

    measured: how many of `sites` sites were.
    """

    pattern: str
    sites: int
    measured: int
    ratio: float

    @property
    def surgeon(self) -> bool:
        """Whether the surgeon chooses."""
        return self.ratio < CLEARLY

    @property
    def said(self) -> str:
        """The choice in a sentence."""
        return (
            f"Features of {self.pattern} are chosen by {'the surgeon' if self.surgeon else 'leverage'}: at "
            f"{self.measured} of {self.sites} sites the surgeon's choice costs the logits {self.ratio:.2f} times what "
            f"leverage's does, and is taken below {CLEARLY:g}."
        )


def try_selections(
    model: nn.Module,
    modules: Sequence[SiteModule],
    layers: Sequence[str],
    items: Sequence[Item],
    solvers: Mapping[str, Solver],
    surgeon: Callable[[Placed], Solver],
    tokens: Tensor,
    how: str,
    memory: Memory,
    progress: Progress,
) -> tuple[dict[str, Solver], tuple[Trial, ...]]:
    """The surgeon's solvers of all sites of the kinds where it does better than leverage, and what was measured.

    solvers: by leverage.   surgeon: from a site to its solver.   tokens: (windows, window) of the calibration text.
    how, memory: the algorithms, and what earlier runs measured of them.
    """
    kinds = kinds_of(modules, lambda placed: isinstance(solvers[placed.site.id], ConsumerColumns))
    if not kinds:
        return {}, ()
    sites = {placed.site.id: placed for alike in kinds.values() for placed in tried(alike)}
    ranks = {item.id: _trial_rank(item, solvers[item.id].errors) for item in items if item.id in sites}
    by_surgeon: dict[str, Solver] = {}

    def diverging() -> dict[str, float]:
        by_surgeon.update({site: surgeon(placed) for site, placed in sites.items()})
        found = {}
        for name, chosen in (("leverage", solvers), ("surgeon", by_surgeon)):
            probes = {site: chosen[site].solution(rank) for site, rank in ranks.items()}
            values = influences(model, modules, layers, probes, probe_tokens(tokens), progress)
            found |= {f"{name} {site}": value for site, value in values.items()}
        return found

    names = [f"{name} {site}" for name in ("leverage", "surgeon") for site in sites]
    found = memory.divergences(names, f"{how}, tried", diverging, "What choices of features do to the logits")
    trials, changed = [], {}
    for kind, alike in kinds.items():
        logs = [_log(found[f"surgeon {p.site.id}"]) - _log(found[f"leverage {p.site.id}"]) for p in tried(alike)]
        trials.append(Trial(kind[0], len(alike), len(logs), math.exp(sum(logs) / len(logs))))
        if trials[-1].surgeon:
            changed |= {one.site.id: by_surgeon.get(one.site.id) or surgeon(one) for one in alike}
    return changed, tuple(trials)


def _log(divergence: float) -> float:
    return math.log(max(divergence, NOISE))


def _trial_rank(item: Item, errors: Tensor) -> int:
    """The most features, up to half, at which leverage's error can be seen."""
    visible = (errors[: item.full_rank // 2 + 1] >= TRIAL_ERROR).nonzero().flatten()
    return item.nearest(float(visible[-1])) if len(visible) else item.lowest()
