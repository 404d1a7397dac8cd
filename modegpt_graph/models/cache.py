"""The folder for files that are fetched or converted once."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_directory() -> Path:
    """`$MODEGPT_GRAPH_CACHE`, else `$XDG_CACHE_HOME/modegpt-graph`, else `~/.cache/modegpt-graph`; not created here."""
    if own := os.environ.get("MODEGPT_GRAPH_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "modegpt-graph"


@contextmanager
def built_in_place(target: Path) -> Iterator[Path]:
    """A fresh folder to fill: renamed to `target` when the block ends well, removed when it does not.

    Where another process was faster, its folder stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield working
        try:
            working.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
