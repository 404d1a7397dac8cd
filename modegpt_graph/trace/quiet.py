"""What torch says on the screen while it traces stays off it: what fails is told in one line, by an error."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch.export._trace


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context torch logs nothing, warns of nothing, and does not print the graph of a failed trace."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with patch.object(torch.export._trace, "print", lambda *_, **__: None, create=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
