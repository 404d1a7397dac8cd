"""What a compression did, in numbers: filled in by the API, drawn by console and HTML, written as JSON.

A value that a run did not measure is None, never a guess.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from modegpt_graph.rewrite.bounds import BoundPoint, is_within


@dataclass(frozen=True)
class SiteOutcome:
    """What one site became.

    id: of the site.   rank: features kept in each group (head), of `full_rank`.
    relative_error: squared error of the pair's output on the calibration set over its squared norm.
    parameters_before, parameters_after: of the matrices and biases in the site's roles.
    tokens: calibration tokens that were routed to an expert; None for any other site, which saw them all.
    bound: what proposition 1, 2 or 3 allows `relative_error` to be at most, from the statistics of this run; None where
    no proposition speaks of it.   curve: the decomposition's own errors and bounds at a few ranks and the chosen one.
    """

    id: str
    rank: int
    full_rank: int
    relative_error: float | None
    parameters_before: int
    parameters_after: int
    tokens: int | None = None
    bound: float | None = None
    curve: tuple[BoundPoint, ...] = ()

    @property
    def bound_holds(self) -> bool | None:
        """Whether every error is within its bound, up to rounding: a bound that is not is a bug. None without one."""
        points = [point.holds for point in self.curve]
        if self.bound is not None and self.relative_error is not None:
            points.append(is_within(self.relative_error, self.bound))
        return all(points) if points else None


@dataclass(frozen=True)
class Ratios:
    """Share of parameters removed (0.3 is 30 %), counted three ways; `decoder_linear` is what `--ratio` asks for."""

    decoder_linear: float
    without_embeddings: float
    all: float


@dataclass(frozen=True)
class Reduction:
    """What a budget counts, of the dense and of the compressed model."""

    before: int
    after: int

    @property
    def share(self) -> float:
        """Share that went: 0.3 is 30 %."""
        return 1 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class Try:
    """One ratio that a search measured: what it was expected to come to, and what it came to."""

    ratio: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Search:
    """How the ratio was found, where it was not given.

    goal: `max_perplexity_increase`, then figures are shares (0.1 is 10 % more perplexity), or `target_size`, then they
    are bytes of the saved weights.   limit: what was asked for.   tries: in order; the last one is the model.
    """

    goal: str
    limit: float
    tries: tuple[Try, ...]


@dataclass(frozen=True)
class CompressionOutcome:
    """What was asked, what was reached, what it cost and what it did to the model.

    ratio: asked for or found, a share of what `budget` counts.   reductions: budget → what it counts before and after.
    context: tokens that a token attends to in the count of multiply-adds.   counted: how it was counted, in sentences.
    choices: between two ways of doing it, by what they do to the logits, one line each.
    search: how the ratio was found.   reused: what was taken from an earlier run, one line each.
    preset: the algorithms, by name.   allocator: how the ratio was spread.
    calibration, evaluation: one line that describes the text ("32 windows of 1,024 of wikitext2").
    fallback_reason: why another calibration source than the one asked for was used, None where it was not.
    bytes_*: of the saved weights.   cache_bytes_per_token_*: key/value cache of one token of one sequence, all layers.
    seconds: by stage, in the order they ran.   forward_passes: what all but the evaluation took, in
    passes of the dense model over the calibration text as its evaluation was timed; None without one.
    kl: mean KL(dense ‖ compressed) in nats per token over the evaluation text.
    approximation: what approximated norms cost and whether they paid, in a few sentences; None where there are none.
    """

    ratio: float
    allocator: str
    seed: int
    calibration: str
    ratios: Ratios
    parameters_before: int
    parameters_after: int
    sites: tuple[SiteOutcome, ...]
    fallback_reason: str | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    cache_bytes_per_token_before: int | None = None
    cache_bytes_per_token_after: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    forward_passes: float | None = None
    perplexity_dense: float | None = None
    perplexity_compressed: float | None = None
    kl: float | None = None
    evaluation: str | None = None
    approximation: str | None = None
    preset: str = "default"
    budget: str = "parameters"
    reductions: Mapping[str, Reduction] = field(default_factory=dict)
    context: int | None = None
    counted: str | None = None
    search: Search | None = None
    choices: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
