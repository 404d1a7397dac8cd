"""How well a model predicts a text."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from modegpt_graph.errors import InputError, OverflowedActivations
from modegpt_graph.models import forward_logits, overflow_advice, positions_of

# Positions whose log-probabilities are in memory at once, in float32 beside the model's own logits.
CHUNK = 256


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, batch_size: int = 1) -> float:
    """exp of the mean negative log-likelihood over the window−1 predictions of each window.

    tokens: (windows, window) int64; windows do not see each other.
    Raises InputError where a window is longer than the model's positions, OverflowedActivations where logits are not
    finite.
    """
    check_length(model, tokens)
    total = 0.0
    for batch in tokens.split(batch_size):
        logits = finite(forward_logits(model, batch))
        for part, targets in chunks(logits, batch):
            total += functional.cross_entropy(part, targets, reduction="sum").double().item()
    return exponential(total / predictions(tokens))


def chunks(logits: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The predictions of a batch in pieces: logits (n, V) in float32 and the tokens (n,) that came next.

    logits: (B, S, V).   tokens: (B, S). The last position predicts nothing that is known.
    """
    targets = tokens.to(logits.device)[:, 1:]
    for start in range(0, targets.shape[1], CHUNK):
        part = logits[:, :-1][:, start : start + CHUNK]
        yield part.flatten(0, 1).float(), targets[:, start : start + CHUNK].flatten()


def predictions(tokens: Tensor) -> int:
    """How many tokens are predicted in (windows, window) tokens."""
    return tokens.shape[0] * (tokens.shape[1] - 1)


def finite(logits: Tensor, name: str = "the model") -> Tensor:
    """The same logits. Raises OverflowedActivations where one of them is not finite."""
    bad = logits.numel() - int(torch.isfinite(logits).sum())
    if bad:
        raise OverflowedActivations(
            f"{name} gave {bad:,} non-finite logits in {logits.dtype}; its activations overflow: "
            f"{overflow_advice(logits.dtype)}"
        )
    return logits


def check_length(model: nn.Module, tokens: Tensor) -> None:
    """Raise InputError where the windows are longer than the model has positions, or predict nothing."""
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise InputError(f"windows must have the shape (windows, window), window ≥ 2, not {tuple(tokens.shape)}")
    positions = positions_of(model)
    if positions is not None and tokens.shape[1] > positions:
        raise InputError(
            f"a window of {tokens.shape[1]} tokens is longer than the model's {positions} positions; "
            f"try --window {positions}"
        )


def exponential(mean: float) -> float:
    """e to the mean; infinite where that is beyond a float, as for a model that is certain of the wrong token."""
    return math.exp(mean) if mean < 700 else math.inf
