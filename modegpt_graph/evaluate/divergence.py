"""How far a compressed model's predictions have moved from the dense model's."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from modegpt_graph.errors import InputError
from modegpt_graph.evaluate.perplexity import check_length, chunks, exponential, finite, predictions
from modegpt_graph.evaluate.timing import timed
from modegpt_graph.models import device_of, forward_logits


@dataclass(frozen=True)
class Divergence:
    """Two models on the same windows.

    kl: mean over predictions of KL(dense ‖ compressed), in nats per token.
    dense_perplexity, perplexity: of the dense and of the compressed model.
    dense_seconds: that the dense model's passes over all windows took.
    """

    kl: float
    dense_perplexity: float
    perplexity: float
    dense_seconds: float


@torch.no_grad()
def compare(dense: nn.Module, compressed: nn.Module, tokens: Tensor, batch_size: int = 1) -> Divergence:
    """KL(dense ‖ compressed) and both perplexities in one pass; the logits of one batch are in memory at a time.

    tokens: (windows, window) int64; the window−1 predictions of each window count, as for the perplexity.
    Raises InputError where the vocabularies differ or a window is too long, OverflowedActivations where logits
    are not finite.
    """
    check_length(dense, tokens)
    check_length(compressed, tokens)
    kl = dense_total = compressed_total = dense_seconds = 0.0
    for batch in tokens.split(batch_size):
        dense_logits, seconds = timed(partial(forward_logits, dense, batch), device_of(dense))
        dense_seconds += seconds
        dense_logits = finite(dense_logits, "the dense model")
        logits = finite(forward_logits(compressed, batch), "the compressed model").to(dense_logits.device)
        if logits.shape != dense_logits.shape:
            raise InputError(
                f"the models have {dense_logits.shape[-1]} and {logits.shape[-1]} tokens in their vocabularies; "
                "only models with the same tokenizer can be compared"
            )
        for (dense_part, targets), (part, _) in zip(chunks(dense_logits, batch), chunks(logits, batch), strict=True):
            expected, found = dense_part.log_softmax(-1), part.log_softmax(-1)
            kl += functional.kl_div(found, expected, reduction="sum", log_target=True).double().item()
            dense_total += functional.nll_loss(expected, targets, reduction="sum").double().item()
            compressed_total += functional.nll_loss(found, targets, reduction="sum").double().item()
    count = predictions(tokens)
    return Divergence(
        kl / count, exponential(dense_total / count), exponential(compressed_total / count), dense_seconds
    )


def kl_divergence(dense: nn.Module, compressed: nn.Module, tokens: Tensor) -> float:
    """Mean KL(dense ‖ compressed) in nats per token over the predictions of each window. Raises as `compare` does."""
    return compare(dense, compressed, tokens).kl
