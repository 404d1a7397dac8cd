"""The JSON a report is written as, field by field: the contract between this tool and whatever reads its files.

`to_json` builds it from an analysis (and the outcome of a compression), `from_json` reads a compression's report back.
Unknown fields are errors in both directions.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from modegpt_graph.errors import InputError
from modegpt_graph.match.sites import Analysis, Certificate, ModelFacts, Role, Site, Unmatched
from modegpt_graph.report.outcome import CompressionOutcome, Ratios, Reduction, Search, SiteOutcome, Try
from modegpt_graph.rewrite.bounds import BoundPoint

SCHEMA_VERSION = 1


class Strict(BaseModel):
    """No unknown fields; a model called `model` is a field like any other."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelJson(Strict):
    """The model that was analysed."""

    name: str
    architecture: str
    parameters: int
    decoder_linear_parameters: int


class RoleJson(Strict):
    """One matrix of a site."""

    parameter: str
    rows: list[tuple[int, int]]


class CertificateJson(Strict):
    """How the commutant is known."""

    method: Literal["structural", "probed", "both"]
    max_error: float | None
    holds: bool


class SiteJson(Strict):
    """A site as `analyze` writes it."""

    id: str
    pattern: str
    variant: str
    type: Literal["I", "II", "III"]
    paper_type: Literal["I", "II", "III"]
    roles: dict[str, RoleJson]
    between: list[str]
    nonlinearities: int
    commutant: Literal["linear", "columns", "blocks", "none"]
    block_size: int | None
    certificate: CertificateJson
    decomposition: Literal["nystrom", "cr", "svd"] | None
    reason: str


class BoundPointJson(Strict):
    """Error of a decomposition at one rank, and what propositions 1 to 3 allow it to be at most."""

    rank: int
    relative_error: float
    bound: float


class CompressedSiteJson(SiteJson):
    """`rank` of `full_rank` features in each of `groups` groups; None for a site that was left alone.

    tokens: calibration tokens that reached an expert, None for other sites.   bound: of `relative_error`.
    bound_curve: the decomposition's own errors at a few ranks.   bound_holds: False is a bug; None without a bound.
    """

    layer: int | None
    groups: int
    full_rank: int
    rank: int | None
    relative_error: float | None
    parameters_before: int | None
    parameters_after: int | None
    tokens: int | None = None
    bound: float | None = None
    bound_holds: bool | None = None
    bound_curve: list[BoundPointJson] = []


class UnmatchedJson(Strict):
    """A matrix that no pattern took."""

    parameter: str
    nearest_pattern: str | None
    reason: str


class RatiosJson(Strict):
    """Shares of parameters removed, counted three ways."""

    decoder_linear: float
    without_embeddings: float
    all: float


class BeforeAfterJson(Strict):
    """One size, dense and compressed."""

    before: int | None
    after: int | None


class ReductionJson(Strict):
    """What a budget counts; `reduction` is the share that went."""

    before: int
    after: int
    reduction: float


class ReductionsJson(Strict):
    """parameters: of the decoder layers' matrices.   bytes: of the stored weights.   multiply_adds: of one token.

    kv_cache: bytes that one more token leaves behind.
    """

    parameters: ReductionJson
    bytes: ReductionJson
    multiply_adds: ReductionJson
    kv_cache: ReductionJson


class TryJson(Strict):
    """One ratio that was measured on the way."""

    ratio: float
    predicted: float
    measured: float


class SearchJson(Strict):
    """How the ratio was found; the last of `tries` is the model. Shares for perplexity, bytes for a size."""

    goal: Literal["max_perplexity_increase", "target_size"]
    limit: float
    predicted: float
    measured: float
    tries: list[TryJson]


class PerplexityJson(Strict):
    """Perplexity on the same windows."""

    dense: float | None
    compressed: float | None


class CompressionJson(Strict):
    """`ratio`, a share of what `budget` counts, was asked for or found; `ratios` and `reductions` were reached.

    context: tokens attended to in `multiply_adds`.   counted: how it was counted.   reused: from an earlier run.
    choices: between two ways of doing it, measured in this run.
    """

    ratio: float
    allocator: str
    seed: int
    calibration: str
    fallback_reason: str | None
    ratios: RatiosJson
    parameters: BeforeAfterJson
    bytes: BeforeAfterJson
    cache_bytes_per_token: BeforeAfterJson
    seconds: dict[str, float]
    forward_passes: float | None
    perplexity: PerplexityJson
    kl: float | None
    evaluation: str | None
    approximation: str | None = None
    preset: str = "default"
    budget: Literal["parameters", "bytes", "multiply-adds", "kv-cache"] = "parameters"
    reductions: ReductionsJson | None = None
    context: int | None = None
    counted: str | None = None
    search: SearchJson | None = None
    choices: list[str] = []
    reused: list[str] = []


class AnalysisJson(Strict):
    """What `analyze --json` writes."""

    schema_version: Literal[1]
    model: ModelJson
    sites: list[SiteJson]
    unmatched: list[UnmatchedJson]
    coverage: float


class CompressionReportJson(Strict):
    """What `compress` writes to `report.json`."""

    schema_version: Literal[1]
    model: ModelJson
    sites: list[CompressedSiteJson]
    unmatched: list[UnmatchedJson]
    coverage: float
    compression: CompressionJson


def to_json(analysis: Analysis, outcome: CompressionOutcome | None = None) -> dict[str, Any]:
    """The report as plain dictionaries and lists, ready for `json.dumps`; with an outcome, what a compression adds.

    Raises ValueError where the outcome speaks of a site that the analysis does not have.
    """
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": {name: getattr(analysis.model, name) for name in ModelJson.model_fields},
        "sites": [_site(site) for site in analysis.sites],
        "unmatched": [
            {name: getattr(entry, name) for name in UnmatchedJson.model_fields} for entry in analysis.unmatched
        ],
        "coverage": analysis.coverage,
    }
    if outcome is None:
        return AnalysisJson.model_validate(report).model_dump(mode="json")
    by_id = {site.id: site for site in outcome.sites}
    if unknown := by_id.keys() - {site.id for site in analysis.sites}:
        raise ValueError(f"the outcome speaks of sites that the analysis does not have: {', '.join(sorted(unknown))}")
    for site, entry in zip(analysis.sites, report["sites"], strict=True):
        entry |= _site_outcome(site, by_id.get(site.id))
    report["compression"] = _compression(outcome)
    return CompressionReportJson.model_validate(report).model_dump(mode="json")


def from_json(report: dict[str, Any], where: str = "report") -> tuple[Analysis, CompressionOutcome]:
    """The analysis and outcome that `to_json` wrote. `where` names the file in errors. Raises InputError."""
    try:
        parsed = CompressionReportJson.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise InputError(f"{where} is not a report of this version: {place}: {first['msg']}") from None
    analysis = Analysis(
        model=ModelFacts(**parsed.model.model_dump()),
        sites=tuple(_read_site(site) for site in parsed.sites),
        unmatched=tuple(Unmatched(**entry.model_dump()) for entry in parsed.unmatched),
        coverage=parsed.coverage,
    )
    return analysis, _read_outcome(parsed)


def _site(site: Site) -> dict[str, Any]:
    plain = {name: getattr(site, name) for name in SiteJson.model_fields}
    plain["roles"] = {
        role: {"parameter": matrix.parameter, "rows": list(matrix.rows)} for role, matrix in site.roles.items()
    }
    plain["between"] = list(site.between)
    plain["certificate"] = {name: getattr(site.certificate, name) for name in CertificateJson.model_fields}
    return plain


def _site_outcome(site: Site, outcome: SiteOutcome | None) -> dict[str, Any]:
    added = ("rank", "relative_error", "parameters_before", "parameters_after", "tokens", "bound", "bound_holds")
    place: dict[str, Any] = {"layer": site.layer, "groups": site.groups, "full_rank": site.full_rank}
    curve = () if outcome is None else outcome.curve
    place["bound_curve"] = [{name: getattr(point, name) for name in BoundPointJson.model_fields} for point in curve]
    return place | {name: None if outcome is None else getattr(outcome, name) for name in added}


def _compression(outcome: CompressionOutcome) -> dict[str, Any]:
    plain = {name: getattr(outcome, name) for name in CompressionJson.model_fields if hasattr(outcome, name)}
    plain["ratios"] = {name: getattr(outcome.ratios, name) for name in RatiosJson.model_fields}
    plain["seconds"] = dict(outcome.seconds)
    plain["choices"] = list(outcome.choices)
    plain["reused"] = list(outcome.reused)
    plain["reductions"] = {
        name.replace("-", "_"): {"before": one.before, "after": one.after, "reduction": one.share}
        for name, one in outcome.reductions.items()
    } or None
    plain["search"] = None if outcome.search is None else _search(outcome.search)
    for name in ("parameters", "bytes", "cache_bytes_per_token"):
        plain[name] = {when: getattr(outcome, f"{name}_{when}") for when in BeforeAfterJson.model_fields}
    plain["perplexity"] = {which: getattr(outcome, f"perplexity_{which}") for which in PerplexityJson.model_fields}
    return plain


def _search(search: Search) -> dict[str, Any]:
    last = search.tries[-1]
    return {
        "goal": search.goal,
        "limit": search.limit,
        "predicted": last.predicted,
        "measured": last.measured,
        "tries": [{name: getattr(one, name) for name in TryJson.model_fields} for one in search.tries],
    }


def _read_site(site: CompressedSiteJson) -> Site:
    return Site(
        id=site.id,
        pattern=site.pattern,
        variant=site.variant,
        type=site.type,
        paper_type=site.paper_type,
        roles={role: Role(matrix.parameter, tuple(matrix.rows)) for role, matrix in site.roles.items()},
        between=tuple(site.between),
        nonlinearities=site.nonlinearities,
        commutant=site.commutant,
        block_size=site.block_size,
        certificate=Certificate(**site.certificate.model_dump()),
        decomposition=site.decomposition,
        reason=site.reason,
        layer=site.layer,
        groups=site.groups,
        full_rank=site.full_rank,
    )


def _read_outcome(report: CompressionReportJson) -> CompressionOutcome:
    compression = report.compression
    if compression.parameters.before is None or compression.parameters.after is None:
        raise InputError("report.json has no parameter counts; compress the model again")
    return CompressionOutcome(
        ratio=compression.ratio,
        preset=compression.preset,
        allocator=compression.allocator,
        seed=compression.seed,
        calibration=compression.calibration,
        fallback_reason=compression.fallback_reason,
        ratios=Ratios(**compression.ratios.model_dump()),
        parameters_before=compression.parameters.before,
        parameters_after=compression.parameters.after,
        bytes_before=compression.bytes.before,
        bytes_after=compression.bytes.after,
        cache_bytes_per_token_before=compression.cache_bytes_per_token.before,
        cache_bytes_per_token_after=compression.cache_bytes_per_token.after,
        seconds=compression.seconds,
        forward_passes=compression.forward_passes,
        perplexity_dense=compression.perplexity.dense,
        perplexity_compressed=compression.perplexity.compressed,
        kl=compression.kl,
        evaluation=compression.evaluation,
        approximation=compression.approximation,
        budget=compression.budget,
        reductions=_read_reductions(compression.reductions),
        context=compression.context,
        counted=compression.counted,
        search=_read_search(compression.search),
        choices=tuple(compression.choices),
        reused=tuple(compression.reused),
        sites=tuple(
            SiteOutcome(
                id=site.id,
                rank=site.rank,
                full_rank=site.full_rank,
                relative_error=site.relative_error,
                parameters_before=site.parameters_before or 0,
                parameters_after=site.parameters_after or 0,
                tokens=site.tokens,
                bound=site.bound,
                curve=tuple(BoundPoint(**point.model_dump()) for point in site.bound_curve),
            )
            for site in report.sites
            if site.rank is not None
        ),
    )


def _read_reductions(reductions: ReductionsJson | None) -> dict[str, Reduction]:
    if reductions is None:
        return {}
    return {name.replace("_", "-"): Reduction(one.before, one.after) for name, one in reductions}


def _read_search(search: SearchJson | None) -> Search | None:
    if search is None:
        return None
    return Search(search.goal, search.limit, tuple(Try(**one.model_dump()) for one in search.tries))
