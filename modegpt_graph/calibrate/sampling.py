"""Text that a model samples itself, for calibration where there is no other, and beside what there is."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modegpt_graph.errors import OverflowedActivations
from modegpt_graph.models import (
    cache_keyword,
    cache_of,
    can_generate,
    device_of,
    forward_logits,
    logits_of,
    overflow_advice,
)
from modegpt_graph.progress import NullProgress, Progress

Start = tuple[int, ...] | Literal["any"] | None
ANY: Start = "any"
LIKELY = 0.7  # temperature of every other own window: what is asked of models is likelier text than what they draw


def own_windows(
    model: nn.Module, windows: int, window: int, seed: int, start: Start = None, progress: Progress | None = None
) -> Tensor | None:
    """What the model writes itself, at two temperatures: as `sample_windows`.

    None for a model that does not write, or without a cache: every token would cost a pass over all before it.
    """
    if _cache_keyword(model) is None:
        return None
    try:
        with (progress or NullProgress()).stage("sample text"):
            return sample_windows(model, windows, window, seed, start, (1.0, LIKELY))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None


@torch.no_grad()
def sample_windows(
    model: nn.Module,
    windows: int = 64,
    window: int = 128,
    seed: int = 0,
    start: Start = None,
    temperatures: Sequence[float] = (1.0,),
) -> Tensor:
    """Seeded ancestral sampling: (windows, window) int64, all windows in one batch, at each temperature in turn.

    start: token ids that each window begins with; ANY for one drawn evenly; by default the model's own beginning of
    text, else ANY. No end of text is drawn. A key/value cache is used where the model has one; any other is called on
    the growing prefix. The global generator is left alone.
    Raises OverflowedActivations where the model's probabilities are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = _first_tokens(model, windows, start)
        try:
            return _continued(model, first, window, temperatures)
        except FloatingPointError:
            advice = overflow_advice(next(model.parameters()).dtype)
            raise OverflowedActivations(f"sampling from the model met non-finite probabilities; {advice}") from None


def _first_tokens(model: nn.Module, windows: int, start: Start) -> Tensor:
    """(windows, n ≥ 1) token ids to begin with."""
    if start is None:
        config: Any = getattr(model, "generation_config", None) or getattr(model, "config", None)
        token = getattr(config, "bos_token_id", None)
        start = ANY if token is None else (token,) if isinstance(token, int) else tuple(token[:1])
    device = device_of(model)
    if start and start != ANY:
        return torch.tensor(start, device=device).expand(windows, -1)
    vocabulary = forward_logits(model, torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    return torch.randint(vocabulary, (windows, 1)).to(device)


def _continued(model: Any, first: Tensor, window: int, temperatures: Sequence[float]) -> Tensor:
    """One token after the other, with the model's cache where it has one."""
    row = torch.arange(len(first), device=first.device)
    divisors = torch.tensor(temperatures, device=first.device)[row % len(temperatures), None]
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    barred = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    tokens, cache, keyword = first[:, :window], None, _cache_keyword(model)
    for _ in range(tokens.shape[1], window):
        if keyword is None:
            logits = forward_logits(model, tokens)
        else:
            given = {} if cache is None else {keyword: cache}
            output = model(tokens if cache is None else tokens[:, -1:], use_cache=True, **given)
            logits, cache = logits_of(output), cache_of(output)
        following = logits[:, -1].float()
        following[:, barred] = -torch.inf
        tokens = torch.cat([tokens, _drawn((following / divisors).softmax(-1))], dim=1)
    return tokens.cpu()


def _cache_keyword(model: nn.Module) -> str | None:
    """The argument that a model takes its cache back by; None for one that does not write with a cache."""
    return cache_keyword(model) if can_generate(model) else None


def _drawn(probabilities: Tensor) -> Tensor:
    """(B, 1) draws from (B, V), by one number a row: a large vocabulary makes `multinomial` the most of the work."""
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    if not bool(torch.isfinite(sums[:, -1]).all()):
        raise FloatingPointError
    drawn = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True).clamp_max(sums.shape[-1] - 1)
