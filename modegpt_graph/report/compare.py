"""A comparison of methods, in numbers: filled in by the API, drawn by console and HTML, written as JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modegpt_graph.match.sites import ModelFacts
from modegpt_graph.methods.names import METHODS
from modegpt_graph.methods.race import Entry
from modegpt_graph.report import words

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Comparison:
    """Methods at ratios on one calibration and one evaluation text.

    calibration, evaluation: one line that describes the text.   fallback_reason: why another calibration text than the
    one asked for was used, None where it was not.   seconds: of what is done once for all methods, by stage.
    """

    model: ModelFacts
    calibration: str
    evaluation: str
    seed: int
    perplexity_dense: float
    entries: tuple[Entry, ...]
    fallback_reason: str | None
    seconds: Mapping[str, float]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names, in the order they ran."""
        return tuple(dict.fromkeys(entry.method for entry in self.entries))

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios asked for, in the order they ran."""
        return tuple(dict.fromkeys(entry.ratio for entry in self.entries))

    def of(self, method: str) -> tuple[Entry, ...]:
        """The entries of one method, by ratio."""
        return tuple(entry for entry in self.entries if entry.method == method)

    def best(self, ratio: float) -> Entry | None:
        """The entry with the least perplexity at a ratio."""
        measured = [one for one in self.entries if one.ratio == ratio and one.perplexity is not None]
        return min(measured, key=lambda one: one.perplexity or math.inf, default=None)

    def reasons(self) -> dict[str, str]:
        """Method → why it gave no figure; with the ratios where the others have one."""
        found: dict[str, str] = {}
        for method in self.methods:
            own = self.of(method)
            for reason in dict.fromkeys(entry.reason for entry in own if entry.reason is not None):
                where = [entry for entry in own if entry.reason == reason]
                at = "" if len(where) == len(own) else f"at {', '.join(f'{e.ratio:.0%}' for e in where)}: "
                found[method] = "; ".join(filter(None, (found.get(method), at + reason)))
        return found


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """What `compare --json` writes. A perplexity beyond a float is null, with the reason."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": comparison.model.name,
            "architecture": comparison.model.architecture,
            "parameters": comparison.model.parameters,
            "decoder_linear_parameters": comparison.model.decoder_linear_parameters,
        },
        "calibration": comparison.calibration,
        "fallback_reason": comparison.fallback_reason,
        "evaluation": comparison.evaluation,
        "seed": comparison.seed,
        "seconds": dict(comparison.seconds),
        "perplexity_dense": comparison.perplexity_dense,
        "methods": {
            name: {"summary": METHODS[name].summary, "source": METHODS[name].source} for name in comparison.methods
        },
        "results": [_entry_json(entry) for entry in comparison.entries],
    }


def _entry_json(entry: Entry) -> dict[str, Any]:
    beyond = entry.perplexity is not None and not math.isfinite(entry.perplexity)
    return {
        "method": entry.method,
        "ratio": entry.ratio,
        "achieved": entry.achieved,
        "perplexity": None if beyond else entry.perplexity,
        "reason": "the perplexity is beyond a float" if beyond else entry.reason,
        "seconds": entry.seconds,
    }


def perplexity_text(value: float) -> str:
    """To three or four digits: 24.31, 118.2, 1.2e+05."""
    return "beyond 1e+300" if math.isinf(value) else words.figure(value)
