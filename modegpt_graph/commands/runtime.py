"""What every command shares: its consoles, a quiet library, its result files."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from modegpt_graph.commands.checks import STANDARD_OUTPUT
from modegpt_graph.report.files import json_text, write_text

debugging = False
"""Set once by `main` from --debug: the libraries' own messages are then let through, and tracebacks shown."""


def results(json_file: Path | None = None) -> Console:
    """Where results are drawn: standard output, or standard error where that is taken by the JSON."""
    return Console(stderr=json_file == STANDARD_OUTPUT, highlight=False)


def messages() -> Console:
    """Where progress goes."""
    return Console(stderr=True, highlight=False)


def quieten() -> None:
    """Keep the libraries' warnings, telemetry and progress bars away from the person, before they are imported."""
    if debugging:
        return
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("DATASETS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("TQDM_DISABLE", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TORCH_LOGS", "-all"),
    ):
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")


def write_json(path: Path | None, value: dict[str, Any]) -> None:
    """To the file, to standard output for `-`, nowhere for None."""
    if path == STANDARD_OUTPUT:
        sys.stdout.write(json_text(value))
    elif path is not None:
        write_text(path, json_text(value))
