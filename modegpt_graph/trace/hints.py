"""Hints that torch's own modules read off the values of a mask: a graph has no values, and needs no hints."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.nn.modules import transformer


@contextmanager
def masks_without_hints() -> Iterator[None]:
    """Within this context a mask is taken as it is: torch's layers do not look whether it hides just the future.

    They look in order to choose a faster kernel that gives the same.
    """

    def detect(mask: Any = None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    with patch.object(transformer, "_detect_is_causal_mask", detect):
        yield
