"""Text by name or by file, all of it read through the `datasets` library."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from modegpt_graph.errors import InputError
from modegpt_graph.models import HubUnreachable, hub_is_reachable

Purpose = Literal["calibration", "evaluation"]
# Where a record has one of these, it is the text; otherwise all its strings are, in the record's own order.
TEXT_FIELDS = ("text", "content", "value")
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class HubText:
    """A text data set of the hub: where it lies, and which split serves which purpose (None: none can)."""

    path: str
    subset: str | None
    calibration: str
    evaluation: str | None
    records: int | None = None


# The splits are the field's: fit on train, measure on test (validation where a test split is not public).
HUB_TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test"),
    "alpaca": HubText("tatsu-lab/alpaca", None, "train", None),
    "c4": HubText("allenai/c4", "en", "train", "validation", records=4000),
}


def check_text(source: str | Path) -> None:
    """Raises InputError where a text is neither the name of a hub data set nor a file that is there, of a kind read."""
    if str(source) in HUB_TEXTS and isinstance(source, str):
        return
    file = Path(source).expanduser()
    if file.suffix not in BUILDERS:
        alike = difflib.get_close_matches(str(source), HUB_TEXTS, n=1)
        advice = f"did you mean {alike[0]}?" if alike else f"known names: {', '.join(HUB_TEXTS)}"
        raise InputError(f"text {source} is neither a {', '.join(BUILDERS)} file nor a known data set; {advice}")
    if not file.is_file():
        raise InputError(f"there is no text file {file}")


def read_text(source: str | Path, purpose: Purpose = "calibration") -> str:
    """The whole text of a .txt, .json, .jsonl or .parquet file, or of a hub data set by name.

    Records are joined by a blank line; within a record, a text field stands alone and other strings are joined by a new
    line (instruction, input, output; the turns of a conversation). A .txt file is taken as it is.
    Raises InputError for a file that is missing, empty or unreadable and for an unknown name; HubUnreachable, within 5
    seconds, where a name is known and the hub is not there.
    """
    check_text(source)
    if str(source) in HUB_TEXTS and isinstance(source, str):
        return _read_hub(source, purpose)
    file = Path(source).expanduser()
    text = _read_file(file)
    if not text.strip():
        raise InputError(f"the text file {file} holds no text")
    return text


def _read_file(file: Path) -> str:
    import datasets

    options: dict[str, Any] = {"sample_by": "document"} if file.suffix == ".txt" else {}
    if file.stat().st_size == 0:
        return ""
    try:
        # Streaming reads the file where it lies; otherwise a converted copy of it would stay in a cache.
        records = datasets.load_dataset(
            BUILDERS[file.suffix], data_files=str(file), split="train", streaming=True, **options
        )
        return SEPARATOR.join(_texts(records))
    except Exception as error:  # each format's reader fails in its own way on a broken file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the text file {file} cannot be read as {file.suffix}: {reason[0]}") from error


def _read_hub(name: str, purpose: Purpose) -> str:
    import datasets
    from datasets import config

    known = HUB_TEXTS[name]
    split = known.calibration if purpose == "calibration" else known.evaluation
    if split is None:
        raise InputError(f"{name} has no held-out split to evaluate on; give a text file or one of wikitext2, c4")
    # In the library's own offline mode a copy in its cache is found at once, and its absence too.
    if not config.HF_HUB_OFFLINE and not hub_is_reachable():
        raise HubUnreachable(
            f"{name} is on the Hugging Face hub, which is out of reach; "
            "give a text file, or set HF_HUB_OFFLINE=1 to use a cached copy"
        )
    try:
        # A set that is taken only in part is streamed; a whole one is worth its place in the library's cache.
        streaming = known.records is not None
        records = datasets.load_dataset(known.path, known.subset, split=split, streaming=streaming)
        return SEPARATOR.join(islice(_texts(records), known.records))
    except OSError as error:
        raise HubUnreachable(f"{name} could not be fetched from the hub: {error}; give a text file instead") from error


def _texts(records: Iterable[Any]) -> Iterator[str]:
    for record in records:
        text = "\n".join(_strings(record))
        if text.strip():
            yield text


def _strings(record: Any) -> Iterator[str]:
    """Every string of `record` that is text, depth first and in order."""
    if isinstance(record, str):
        if record.strip():
            yield record
    elif isinstance(record, dict):
        field = next((name for name in TEXT_FIELDS if isinstance(record.get(name), str)), None)
        for part in record.values() if field is None else (record[field],):
            yield from _strings(part)
    elif isinstance(record, (list, tuple)):
        for part in record:
            yield from _strings(part)
