"""What a compression did, in numbers: filled in by the API, drawn by console and HTML, written as JSON.

A value that a run did not measure is None, never a guess.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SiteOutcome:
    """What one site became.

    id: of the site.   rank: features kept in each group (head), of `full_rank`.
    relative_error: squared error of the pair's output on the calibration set over its squared norm.
    parameters_before, parameters_after: of the matrices and biases in the site's roles.
    tokens: calibration tokens that were routed to an expert; None for any other site, which saw them all.
    """

    id: str
    rank: int
    full_rank: int
    relative_error: float | None
    parameters_before: int
    parameters_after: int
    tokens: int | None = None


@dataclass(frozen=True)
class Ratios:
    """Share of parameters removed (0.3 is 30 %), counted three ways; `decoder_linear` is what `--ratio` asks for."""

    decoder_linear: float
    without_embeddings: float
    all: float


@dataclass(frozen=True)
class CompressionOutcome:
    """What was asked, what was reached, what it cost and what it did to the model.

    ratio: asked for.   preset: the algorithms, by name.   allocator: how the ratio was spread.
    calibration, evaluation: one line that describes the text ("32 windows of 1,024 of wikitext2").
    fallback_reason: why another calibration source than the one asked for was used, None where it was not.
    bytes_*: of the saved weights.   cache_bytes_per_token_*: key/value cache of one token of one sequence, all layers.
    seconds: by stage, in the order they ran.   forward_passes: cost of calibration in plain passes over its tokens.
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
