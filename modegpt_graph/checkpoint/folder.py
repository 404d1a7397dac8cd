"""An output folder that is there whole, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modegpt_graph.errors import InputError


def check_free(directory: Path) -> None:
    """Raise InputError where `directory` is anything but absent or an empty folder."""
    if directory.is_dir():
        if any(directory.iterdir()):
            raise InputError(f"{directory} exists and is not empty; name a new folder or empty this one")
    elif directory.exists() or directory.is_symlink():
        raise InputError(f"{directory} is not a folder; name a new folder")


@contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """A fresh folder beside `directory` to fill: renamed to it when the block ends well, removed when it does not.

    Raises InputError where `directory` is taken, before the block or at its end, or cannot be made.
    """
    directory = directory.expanduser().absolute()
    check_free(directory)
    made = [folder for folder in directory.parents if not folder.exists()]
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise InputError(f"{directory} cannot be made: {error.strerror or error}") from error
    try:
        yield working
        # mkdtemp makes folders private; this one gets the permissions that any new folder would.
        mask = os.umask(0)
        os.umask(mask)
        working.chmod(0o777 & ~mask)
        check_free(directory)
        working.replace(directory)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
