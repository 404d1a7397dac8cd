"""Zero-shot accuracy: how often a model finds the right one of several continuations the likeliest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.errors import InputError
from modegpt_graph.evaluate.perplexity import finite
from modegpt_graph.evaluate.task_files import Task
from modegpt_graph.models import forward_logits, positions_of
from modegpt_graph.progress import NullProgress, Progress

LOGITS_PER_BATCH = 2**25  # in memory at once: 128 MB in float32


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered right, with its standard error: sqrt(p (1 − p) / (n − 1)).

    accuracy: by the log-likelihood of the continuation.   normalised: by that log-likelihood over the continuation's
    length in characters, which does not favour short answers.   chance: what guessing gives.
    """

    name: str
    questions: int
    chance: float
    accuracy: float
    accuracy_error: float
    normalised: float
    normalised_error: float


@dataclass(frozen=True)
class _Row:
    """tokens: (n,) context and continuation.   start: where the continuation begins."""

    tokens: Tensor
    start: int


def accuracies(
    model: nn.Module, tokenizer: Any, tasks: Sequence[Task], progress: Progress | None = None
) -> tuple[Accuracy, ...]:
    """Accuracy on every task. Raises InputError where there is no tokenizer or a continuation has no tokens."""
    if tokenizer is None:
        raise InputError("the model has no tokenizer to read tasks with")
    progress = progress or NullProgress()
    found = []
    for task in tasks:
        rows = [_row(tokenizer, pair, positions_of(model)) for question in task.questions for pair in question.pairs]
        with progress.stage(f"answer {task.name}", len(rows)) as stage:
            found.append(_accuracy(task, log_likelihoods(model, rows, stage.advance)))
    return tuple(found)


@torch.no_grad()
def log_likelihoods(model: nn.Module, rows: Sequence[_Row], advance: Any = lambda count: None) -> Tensor:
    """(rows,) float64 Σ log p(token | all before it) over each row's continuation.

    Rows of like length are run together, aligned on the left: what fills a shorter one up comes after everything that
    counts, where causal attention does not see it.
    """
    values = torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
    vocabulary = max((part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)), default=1)
    first = 0
    while first < len(order):
        length = len(rows[order[first]].tokens)
        batch = order[first : first + max(1, LOGITS_PER_BATCH // (vocabulary * length))]
        tokens = torch.zeros(len(batch), length, dtype=torch.int64)
        for place, index in enumerate(batch):
            tokens[place, : len(rows[index].tokens)] = rows[index].tokens
        logits = forward_logits(model, tokens)  # (B, S, V)
        for place, index in enumerate(batch):
            start, end = rows[index].start, len(rows[index].tokens)
            predicted = finite(logits[place, start - 1 : end - 1]).float().log_softmax(-1)
            targets = rows[index].tokens[start:end].to(predicted.device)
            values[index] = predicted.gather(1, targets[:, None]).double().sum()
        first += len(batch)
        advance(len(batch))
    return values


def _accuracy(task: Task, values: Tensor) -> Accuracy:
    plain = normalised = 0
    first = 0
    for question in task.questions:
        own = values[first : first + len(question.pairs)]
        lengths = torch.tensor([max(len(continuation.strip()), 1) for _, continuation in question.pairs])
        plain += int(own.argmax()) == question.gold
        normalised += int((own / lengths).argmax()) == question.gold
        first += len(question.pairs)
    count = len(task.questions)
    chance = sum(1 / len(question.pairs) for question in task.questions) / count
    return Accuracy(task.name, count, chance, *_share(plain, count), *_share(normalised, count))


def _share(right: int, count: int) -> tuple[float, float]:
    """A share and its standard error; that of one question is not known, and infinite."""
    share = right / count
    return share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.inf


def _row(tokenizer: Any, pair: tuple[str, str], positions: int | None) -> _Row:
    """A pair tokenised as one text; the continuation is what the context alone does not have.

    Where both are longer than the model's positions, the beginning of the context goes.
    """
    context, continuation = pair
    before = _tokens(tokenizer, context)
    lead, whole = _led(tokenizer, context + continuation)
    start = len(lead) + min(len(before), len(whole) - 1)
    tokens = [*lead, *whole]
    if not whole:
        raise InputError(f"the continuation {continuation!r} has no tokens")
    if start == 0:
        begin = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        if begin is None:
            raise InputError(f"nothing stands before {continuation!r}, and the tokenizer has no token to begin with")
        tokens, start = [begin, *tokens], 1
    over = max(0, len(tokens) - (positions or len(tokens)))
    if start - over < 1:
        raise InputError(f"the continuation {continuation[:40]!r}… is longer than the model's {positions} positions")
    return _Row(torch.tensor(tokens[over:]), start - over)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _led(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before a text, and the text's own tokens."""
    plain, full = _tokens(tokenizer, text), list(tokenizer(text)["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], plain
    return [], full
