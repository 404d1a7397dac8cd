"""The figures of a compression that need no text: sizes, ranks and errors, counted on the models themselves."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.text import Calibration
from modegpt_graph.match.modules import SiteModule
from modegpt_graph.models import cache_of, can_generate
from modegpt_graph.report.outcome import CompressionOutcome, Ratios, SiteOutcome
from modegpt_graph.rewrite.budget import parameter_count, site_items, stored_bytes
from modegpt_graph.rewrite.solution import Solution, rank_of


def measure(
    dense: nn.Module,
    smaller: nn.Module,
    modules: Sequence[SiteModule],
    solutions: Mapping[str, Solution],
    decoder_linear_parameters: int,
    *,
    ratio: float,
    preset: str,
    allocator: str,
    seed: int,
    text: Calibration,
) -> CompressionOutcome:
    """What was asked and what it came to."""
    sites = _sites(modules, solutions)
    removed = sum(site.parameters_before - site.parameters_after for site in sites)
    before, after = parameter_count(dense), parameter_count(smaller)
    inner = parameter_count(dense, without_embeddings=True)
    inner_after = parameter_count(smaller, without_embeddings=True)
    return CompressionOutcome(
        ratio=ratio,
        preset=preset,
        allocator=allocator,
        seed=seed,
        calibration=text.description,
        ratios=Ratios(removed / decoder_linear_parameters, 1 - inner_after / inner, 1 - after / before),
        parameters_before=before,
        parameters_after=after,
        sites=sites,
        fallback_reason=text.fallback_reason,
        bytes_before=stored_bytes(dense),
        bytes_after=stored_bytes(smaller),
        cache_bytes_per_token_before=cache_bytes(dense),
        cache_bytes_per_token_after=cache_bytes(smaller),
    )


def _sites(modules: Sequence[SiteModule], solutions: Mapping[str, Solution]) -> tuple[SiteOutcome, ...]:
    items = {item.id: item for item in site_items(modules)}
    found = []
    for placed in (placed for one in modules for placed in one.placed):
        layout, item = placed.footprint.layout, items[placed.site.id]
        solution = solutions.get(placed.site.id)
        rank = layout.size if solution is None else rank_of(solution.kept, layout)
        error = 0.0 if solution is None else solution.relative_error
        sites = placed.site.apart()
        before, removed = item.removed(0) // len(sites), item.removed(rank) // len(sites)
        for number, site in enumerate(sites):
            tokens = None
            if solution is not None and solution.experts:
                error, tokens = solution.experts[number].relative_error, solution.experts[number].tokens
            found.append(SiteOutcome(site.id, rank, layout.size, error, before, before - removed, tokens))
    return tuple(found)


def cache_bytes(model: nn.Module) -> int | None:
    """Bytes that one more token of one sequence takes in the key/value cache; None for models without one."""
    if not can_generate(model):
        return None
    with torch.no_grad():
        cache = cache_of(model(torch.zeros(1, 1, dtype=torch.long), use_cache=True))
    tensors = [t for layer in getattr(cache, "layers", ()) for t in vars(layer).values() if isinstance(t, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) or None
