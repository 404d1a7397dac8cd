"""Text that a model samples itself, for calibration where there is no other."""

from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.errors import OverflowedActivations
from modegpt_graph.models import can_generate, device_of, forward_logits, overflow_advice


@torch.no_grad()
def sample_windows(
    model: nn.Module, windows: int = 64, window: int = 128, seed: int = 0, start_token: int | None = None
) -> Tensor:
    """Seeded ancestral sampling at temperature 1: (windows, window) int64, all windows in one batch.

    Each window starts with `start_token`, else the model's own beginning-of-text token, else a token drawn evenly. With
    `generate` the key/value cache is used; a plain module is called on the growing prefix. The global generator is left
    alone. Raises OverflowedActivations where the model's probabilities are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = _first_tokens(model, windows, start_token)
        try:
            if can_generate(model):
                return _generated(model, first, window)
            return _continued(model, first, window)
        except RuntimeError as error:
            if "probability tensor" in str(error):
                dtype = next(model.parameters()).dtype
                raise OverflowedActivations(
                    f"sampling from the model met non-finite probabilities; {overflow_advice(dtype)}"
                ) from error
            raise


def _first_tokens(model: nn.Module, windows: int, start_token: int | None) -> Tensor:
    """(windows, 1) token ids to begin with."""
    if start_token is None:
        config: Any = getattr(model, "generation_config", None) or getattr(model, "config", None)
        start_token = getattr(config, "bos_token_id", None)
    if isinstance(start_token, (list, tuple)):
        start_token = start_token[0] if start_token else None
    device = device_of(model)
    if start_token is not None:
        return torch.full((windows, 1), start_token, dtype=torch.int64, device=device)
    vocabulary = forward_logits(model, torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    return torch.randint(vocabulary, (windows, 1)).to(device)


def _generated(model: Any, first: Tensor, window: int) -> Tensor:
    # Everything a model's own generation settings could bend is set back: the samples must come from its distribution.
    # min_new_tokens keeps end-of-text from being drawn, so that every window is full.
    return model.generate(
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=window - 1,
        max_new_tokens=window - 1,
        use_cache=True,
        return_dict_in_generate=False,
    ).cpu()


def _continued(model: nn.Module, first: Tensor, window: int) -> Tensor:
    tokens = first
    for _ in range(window - 1):
        probabilities = forward_logits(model, tokens)[:, -1].float().softmax(-1)  # (B, V)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], dim=1)
    return tokens.cpu()
