"""One run's share of the store: measured, or taken from an earlier run, and said."""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from modegpt_graph.calibrate.observe import Calibrated
from modegpt_graph.calibrate.store import Store


@dataclass
class Memory:
    """store: None to measure everything.   key: of all that statistics depend on.

    said: what was taken from an earlier run, a sentence each, for the report.
    """

    store: Store | None = None
    key: str = ""
    said: list[str] = field(default_factory=list)

    def calibrated(self, sites: Iterable[str], measure: Callable[[], Calibrated]) -> Calibrated:
        """Statistics of exactly these sites."""
        if self.store is None:
            return measure()
        found = self.store.statistics(self.key, sites)
        if found is not None:
            self.said.append(_sentence("Statistics of the calibration text", found.seconds))
            return found.calibrated
        start = time.perf_counter()
        calibrated = measure()
        self.store.keep_statistics(self.key, calibrated, time.perf_counter() - start)
        return calibrated

    def divergences(
        self,
        sites: Iterable[str],
        how: str,
        measure: Callable[[], dict[str, float]],
        what: str = "What sites do to the logits",
    ) -> dict[str, float]:
        """What each site does to the logits. how: the algorithms that make it smaller.   what: it is, in words."""
        if self.store is None:
            return measure()
        key = hashlib.blake2b(f"{self.key} divergences {how}".encode(), digest_size=20).hexdigest()
        found = self.store.numbers(key, sites)
        if found is not None:
            self.said.append(_sentence(what, found[1]))
            return found[0]
        start = time.perf_counter()
        divergences = measure()
        self.store.keep_numbers(key, divergences, time.perf_counter() - start)
        return divergences


def _sentence(what: str, seconds: float) -> str:
    return f"{what}: from an earlier run, which took {seconds:.0f} s for it."
