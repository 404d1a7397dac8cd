"""What torch says on the screen while it traces stays off it: what fails is told in one line, by an error."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch.export._trace


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context torch logs nothing, and does not print the graph that it had got when it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with patch.object(torch.export._trace, "print", lambda *_, **__: None, create=True):
            yield
    finally:
        logging.disable(before)
