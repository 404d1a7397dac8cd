"""Report files: whole or not there."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from modegpt_graph.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a reader never sees half a file, and a failure leaves the old one.

    Raises InputError where the folder cannot be written to.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        # mkstemp makes files private; a report gets the permissions any new file would.
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def json_text(value: dict[str, Any]) -> str:
    """JSON as it is written everywhere: indented, in UTF-8, with a final newline; NaN is an error."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
