"""Text to windows of token ids, for calibration and for evaluation."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.general import general_ids
from modegpt_graph.calibrate.sampling import ANY, Start, own_windows, sample_windows
from modegpt_graph.calibrate.sources import check_text, read_text
from modegpt_graph.errors import InputError
from modegpt_graph.models import HubUnreachable, positions_of, vocabulary_of
from modegpt_graph.progress import Progress

SELF = "self"
# Text that the model writes costs a forward pass per token: fewer tokens than are read from a file.
SELF_WINDOWS = 64
SELF_WINDOW = 128
SHORTEST_WINDOW = 128
OTHER_WINDOWS = (128, 512)  # the shortest and the longest; long ones show more of what a model does with a context
FEWEST = 8  # windows of other text: fewer tell of nothing
SAMPLED = 0.4  # of as much general text: each token that a model samples costs a pass
HELD_OUT = 8  # windows of calibration text, at most, that are kept for the evaluation


@dataclass(frozen=True)
class Calibration:
    """Token ids to calibrate on.

    tokens: (windows, window) int64.   description: what the text is, in words, for the report.
    fallback_reason: why the text is not the one that was asked for; None where it is.   is_sampled: whether the model
    wrote it.   start: token ids that the tokenizer begins a text with, ANY for none; None where that is not known.
    tokenizer: that of the model; None where it has none.   other: (windows, window) of another text; None for none.
    """

    tokens: Tensor
    description: str
    fallback_reason: str | None = None
    is_sampled: bool = False
    start: Start = None
    tokenizer: Any = field(default=None, repr=False)
    other: Tensor | None = None

    def with_other(self, model: nn.Module, share: float, seed: int, progress: Progress | None = None) -> "Calibration":
        """With `share` as many tokens of the general text that comes with the tool.

        Where the tokenizer cannot read that, with fewer that the model samples itself, unless it wrote all there is.
        """
        general = self._general(model, *self._size(share, OTHER_WINDOWS[1]))
        if general is not None:
            return self._beside(general, "of general text")
        windows, window = self._size(SAMPLED * share, OTHER_WINDOWS[0])
        if self.is_sampled or not windows:
            return self
        own = own_windows(model, windows, window, seed, self.start, progress)
        return self if own is None else self._beside(own, "that the model samples")

    def _size(self, share: float, longest: int) -> tuple[int, int]:
        """Windows of other text, `share` as many tokens as there are, or none where these are too few; their length."""
        tokens, given = int(share * self.tokens.numel()), self.tokens.shape[1]
        window = min(tokens // FEWEST, longest, given)
        return (tokens // window, window) if window >= min(OTHER_WINDOWS[0], given) else (0, 0)

    def _general(self, model: nn.Module, windows: int, window: int) -> Tensor | None:
        """So many windows from all over the general text, or what it has; None where the tokenizer cannot read it."""
        if self.tokenizer is None or not windows:
            return None
        ids = general_ids(self.tokenizer, vocabulary_of(model))
        if ids is None:
            return None
        available = _cut(ids, window, _begin(ids[:window], self.tokenizer))
        return available[torch.linspace(0, len(available) - 1, min(windows, len(available))).round().long()]

    def _beside(self, other: Tensor, what: str) -> "Calibration":
        return replace(self, other=other, description=f"{self.description}; {windows_line(other)} {what}")

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Token ids of all, those of the text first."""
        return (self.tokens,) if self.other is None else (self.tokens, self.other)


def check_source(source: str | Path | Tensor) -> None:
    """Raises InputError for a text that is not there, before any work starts; the hub is not asked."""
    if not isinstance(source, Tensor) and str(source) != SELF:
        check_text(source)


def calibration_windows(
    source: str | Path | Tensor,
    tokenizer: Any,
    *,
    windows: int = 32,
    window: int = 1024,
    seed: int = 0,
    model: nn.Module | None = None,
) -> Calibration:
    """`windows` windows of `window` tokens, drawn by `seed` without overlap from the text of `source`.

    source: a text file, a hub data set by name, `self` (text that `model` samples), or token ids (windows, window).
    The whole text is tokenised once and cut into windows; a seeded choice of them is returned in the text's order. Each
    begins with the special tokens that the tokenizer begins a text with, if it does.
    A text with fewer windows gives those it has; one shorter than a window gives one window of its length, from 128
    tokens on; a window longer than the model's positions is cut to them. Each is said in the description.
    Where the hub is out of reach and `model` is given, `self` takes its place and the reason is kept.
    Raises InputError for missing, empty or too short text, wrongly shaped token ids, and a missing tokenizer or model.
    """
    if isinstance(source, Tensor):
        tokens = checked_tokens(source)
        return Calibration(tokens, f"token ids as given, {windows_line(tokens)}", tokenizer=tokenizer)
    asked, window = window, min(window, positions_of(model) or window)
    if str(source) == SELF:
        return _sampled(model, tokenizer, seed, window, fallback_reason=None)
    try:
        text = read_text(source)
    except HubUnreachable as error:
        if model is None:
            raise
        return _sampled(model, tokenizer, seed, window, fallback_reason=str(error))
    ids = _tokenised(text, tokenizer, source, calibrating=True)
    shortest = min(window, SHORTEST_WINDOW)
    if len(ids) < shortest:
        raise InputError(f"the text of {source} has {len(ids):,} tokens; calibration needs {shortest} at least")
    window = min(window, len(ids))
    begin = _begin(ids[:window], tokenizer)
    available = _cut(ids, window, begin)
    order = torch.randperm(len(available), generator=torch.Generator().manual_seed(seed))
    tokens = available[order[:windows].sort().values]
    fewer = f"; {windows} of {asked:,} were asked for" if (len(available) < windows or window < asked) else ""
    start = tuple(ids[:begin].tolist()) or ANY
    return Calibration(tokens, f"{source}, {windows_line(tokens)}{fewer}", start=start, tokenizer=tokenizer)


def held_out_windows(
    source: str | Path | Tensor,
    tokenizer: Any,
    *,
    windows: int,
    window: int,
    seed: int,
    model: nn.Module | None,
    evaluating: bool = True,
    of_tokens: bool = False,
) -> tuple[Calibration, Tensor | None]:
    """As `calibration_windows`, and further windows of the same text that are held out of it for an evaluation.

    None in place of these where none is asked for or left.   of_tokens: whether some are held out of token ids too,
    which are all used otherwise.
    """
    extra = max(1, min(HELD_OUT, windows // 4))
    if isinstance(source, Tensor):
        extra = max(1, min(HELD_OUT, len(source) // 4)) if of_tokens else 0
    text = calibration_windows(
        source, tokenizer, windows=windows + extra * evaluating, window=window, seed=seed, model=model
    )
    count = min(extra, len(text.tokens) - 1) if evaluating else 0
    if count < 1:
        return text, None
    chosen = torch.zeros(len(text.tokens), dtype=torch.bool)
    chosen[torch.linspace(0, len(text.tokens) - 1, count).round().long()] = True
    description = f"{text.description}, {count} of them held out for the evaluation"
    return replace(text, tokens=text.tokens[~chosen], description=description), text.tokens[chosen]


def evaluation_windows(
    source: str | Path | Tensor, tokenizer: Any, window: int = 2048, windows: int | None = None
) -> Tensor:
    """The first `windows` non-overlapping windows of the text, all whole ones where None: (windows, window) int64.

    source: as for calibration, but for `self`: a model is not measured on its own words.
    Raises InputError for missing, empty or too short text.
    """
    if isinstance(source, Tensor):
        return checked_tokens(source)[:windows]
    if str(source) == SELF:
        raise InputError("self is text for calibration; to evaluate, give a text file or a data set's name")
    ids = _tokenised(read_text(source, "evaluation"), tokenizer, source, calibrating=False)
    available = len(ids) // window
    if not available:
        raise InputError(
            f"the text of {source} has {len(ids):,} tokens, fewer than one window of {window:,}; try --window"
        )
    return ids[: available * window].view(available, window)[:windows].clone()


def checked_tokens(tokens: Tensor) -> Tensor:
    """`tokens` as int64. Raises InputError where they are not a non-empty (windows, window ≥ 2) integer tensor."""
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.shape[1] < 2:
        raise InputError(f"token ids must have the shape (windows, window), not {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(f"token ids must be integers, not {tokens.dtype}")
    if int(tokens.min()) < 0:
        raise InputError("token ids must not be negative")
    return tokens.detach().to(device="cpu", dtype=torch.int64)


def _sampled(
    model: nn.Module | None, tokenizer: Any, seed: int, window: int, *, fallback_reason: str | None
) -> Calibration:
    if model is None:
        raise InputError("calibration text 'self' is sampled from the model, and no model was given")
    tokens = sample_windows(model, SELF_WINDOWS, min(window, SELF_WINDOW), seed)
    description = f"text sampled from the model itself, {windows_line(tokens)}"
    return Calibration(tokens, description, fallback_reason, is_sampled=True, tokenizer=tokenizer)


def _tokenised(text: str, tokenizer: Any, source: str | Path, *, calibrating: bool) -> Tensor:
    """Token ids (N,) of the whole text, with the special tokens that the tokenizer itself puts around a text."""
    if tokenizer is None:
        what = f"the model has no tokenizer to read {source} with; give token ids"
        raise InputError(f"{what}{f', or use {SELF!r}' if calibrating else ' from Python'}")
    # verbose=False: the whole text is longer than the model's context by design, which the tokenizer would warn of.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _begin(ids: Tensor, tokenizer: Any) -> int:
    """How many special tokens the tokenizer has put before the text of `ids`; 0 where they are no text."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return next((place for place, one in enumerate(map(int, ids)) if one not in special), 0)


def _cut(ids: Tensor, window: int, begin: int) -> Tensor:
    """(windows, window) of (N,) token ids, without overlap, each with the first `begin` before it.

    Few models are used without the beginning that they have always seen, and they compute something else then.
    """
    rest, size = ids[begin:], window - begin
    cut = rest[: len(rest) // size * size].view(-1, size)
    return torch.cat([ids[:begin].expand(len(cut), -1), cut], dim=1)


def windows_line(tokens: Tensor) -> str:
    """`32 windows of 1,024 tokens`."""
    return f"{tokens.shape[0]:,} window{'s' * (tokens.shape[0] != 1)} of {tokens.shape[1]:,} tokens"
