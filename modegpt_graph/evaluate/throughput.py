"""How many tokens a second a model reads and writes."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from modegpt_graph.errors import InputError
from modegpt_graph.evaluate.timing import timed
from modegpt_graph.models import cache_keyword, cache_of, can_generate, device_of


@dataclass(frozen=True)
class Throughput:
    """Tokens per second, all sequences of the batch together.

    prefill: reading the prompt in one pass.   decode: writing new tokens one at a time, with the key/value cache.
    """

    prefill: float
    decode: float


@dataclass(frozen=True)
class ThroughputComparison:
    """Two models measured in turns, and the compressed one's speed over the dense one's.

    The speeds are medians over the rounds; the ratios are medians of each round's own ratio, so that a machine that
    slows down over the run does not count against either model.
    """

    dense: Throughput
    compressed: Throughput
    prefill_ratio: float
    decode_ratio: float


def random_prompt(vocabulary: int, batch: int = 1, length: int = 512, seed: int = 0) -> Tensor:
    """(batch, length) token ids drawn evenly: speed does not depend on which tokens they are."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def check_decodes(model: nn.Module) -> str:
    """Name of the argument that a model takes its cache back by.

    Raises InputError for a model without `generate` or cache.
    """
    keyword = cache_keyword(model)
    if not can_generate(model) or keyword is None:
        raise InputError("speed is measured on models with `generate` and a key/value cache; this one has none")
    return keyword


@torch.no_grad()
def tokens_per_second(model: nn.Module, prompt: Tensor, new_tokens: int) -> Throughput:
    """Time one prefill of `prompt` (B, S), and then the greedy writing of `new_tokens` tokens after it.

    Raises InputError for a model without `generate`: without a cache there is no decoding speed to speak of.
    """
    keyword = check_decodes(model)
    if new_tokens < 1 or prompt.ndim != 2 or prompt.numel() == 0:
        raise InputError("speed needs a prompt of shape (batch, length) and at least one new token")
    prompt = prompt.to(device_of(model))
    # As `generate` does it: only the last position's logits are needed to go on.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output, prefill_seconds = timed(partial(model, prompt, use_cache=True, **last_only), prompt.device)
    decode_seconds = 0.0
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)  # (B, 1)
        step = partial(model, token, use_cache=True, **{keyword: cache_of(output)})
        output, seconds = timed(step, prompt.device)
        decode_seconds += seconds
    return Throughput(prompt.numel() / prefill_seconds, prompt.shape[0] * new_tokens / decode_seconds)


def compare_throughput(
    dense: nn.Module,
    compressed: nn.Module,
    prompt: Tensor,
    new_tokens: int,
    rounds: int = 5,
    advance: Callable[[], object] = lambda: None,
) -> ThroughputComparison:
    """Measure both models in turns for `rounds` rounds, after one round that warms up and does not count.

    advance: called after every round.
    """
    models = (dense, compressed)
    for model in models:
        tokens_per_second(model, prompt, 1)
    measured: tuple[list[Throughput], list[Throughput]] = ([], [])
    for turn in range(rounds):
        # Who goes first alternates: the second of a pair finds warmer caches and a hotter processor.
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            measured[which].append(tokens_per_second(models[which], prompt, new_tokens))
        advance()
    dense_runs, compressed_runs = measured
    pairs = list(zip(dense_runs, compressed_runs, strict=True))
    return ThroughputComparison(
        dense=_median(dense_runs),
        compressed=_median(compressed_runs),
        prefill_ratio=median(after.prefill / before.prefill for before, after in pairs),
        decode_ratio=median(after.decode / before.decode for before, after in pairs),
    )


def _median(runs: list[Throughput]) -> Throughput:
    return Throughput(median(run.prefill for run in runs), median(run.decode for run in runs))
