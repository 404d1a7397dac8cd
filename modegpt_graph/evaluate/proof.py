"""The user's own proof: every site rewritten at full rank in shuffled order leaves the model as it was."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.match.site_module import SiteModule
from modegpt_graph.models import can_generate, forward_logits, vocabulary_of
from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.rewrite.apply import rewrite
from modegpt_graph.rewrite.solution import shuffled


@dataclass(frozen=True)
class Proof:
    """A rewrite of every site at full rank, in shuffled order.

    max_relative_error: largest change of a logit over the largest logit.   generation_identical: whether greedy
    generation gave the same tokens, None where the original's own code fails at it.   sites: how many were rewritten.
    """

    max_relative_error: float
    generation_identical: bool | None
    sites: int


def prove(
    original: nn.Module,
    modules: tuple[SiteModule, ...],
    seed: int = 0,
    example_inputs: tuple[Any, ...] | None = None,
    progress: Progress | None = None,
) -> Proof:
    """Rewrite every site of a copy in shuffled order, and compare its logits and greedy generation with the original's.

    example_inputs: whose first are the token ids to compare on; random ones where None.
    """
    progress = progress or NullProgress()
    generator = torch.Generator().manual_seed(seed)
    solutions = {p.site.id: shuffled(p.footprint.layout, generator) for one in modules for p in one.placed}
    with progress.stage("rewrite"):
        changed = copy.deepcopy(original)
        rewrite(changed, modules, solutions)
    with progress.stage("compare"):
        tokens = _random_tokens(original, example_inputs, generator)
        error = max(_error(original, changed, one) for one in _other_sizes(original, tokens))
        try:
            expected = _greedy(original, tokens)
        except Exception:  # the library's or the model's own; the logits were compared
            same = None
        else:
            same = torch.equal(expected, _greedy(changed, tokens))
    return Proof(error, same, sum(len(p.site.apart()) for one in modules for p in one.placed))


def _error(original: nn.Module, changed: nn.Module, tokens: Tensor) -> float:
    """Largest change of a logit over the largest logit."""
    with torch.no_grad():
        before, after = forward_logits(original, tokens), forward_logits(changed, tokens)
    return float((before - after).abs().max() / before.abs().max())


def _other_sizes(model: nn.Module, tokens: Tensor) -> Iterator[Tensor]:
    """The tokens; for a module of the user's own also one alone, and longer ones where it takes them.

    Code that goes another way at other sizes is the user's: the library's keeps to what a mask and a cache tell it.
    """
    yield tokens
    if not can_generate(model):
        for other in (tokens[:1, :1], torch.cat([tokens, tokens.flip(1)], dim=1)):
            try:
                with torch.no_grad():
                    forward_logits(model, other)
            except Exception:  # its own code may say no to a size in any way
                continue
            yield other


def _random_tokens(model: nn.Module, example_inputs: tuple[Any, ...] | None, generator: torch.Generator) -> Tensor:
    if example_inputs is not None:
        return example_inputs[0]
    return torch.randint(0, vocabulary_of(model), (2, 24), generator=generator)


def _greedy(model: Any, tokens: Tensor, count: int = 16) -> Tensor:
    """The next tokens by greedy generation, with the cache where the model has one; of logits alone where not."""
    with torch.no_grad():
        if can_generate(model):
            mask = torch.ones_like(tokens)
            return model.generate(
                tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        return forward_logits(model, tokens).argmax(-1)
