"""What can be known to be wrong before any work starts. Each check raises InputError with what to do."""

import tempfile
from pathlib import Path

from modegpt_graph.errors import InputError

HIGHEST_RATIO = 0.95
TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
STANDARD_OUTPUT = Path("-")


def ratio(value: float, option: str = "--ratio") -> None:
    """In (0, 0.95]; not a number is outside."""
    if not 0 < value <= HIGHEST_RATIO:
        advice = f"; did you mean {value / 100:g}?" if 5 <= value <= 100 * HIGHEST_RATIO else "; 0.3 removes 30 %"
        raise InputError(f"{option} {value:g} is outside (0, {HIGHEST_RATIO}]{advice}")


def one_goal(**options: object) -> None:
    """Exactly one of these options was given."""
    names = [f"--{name.replace('_', '-')}" for name in options]
    given = [name for name, value in zip(names, options.values(), strict=True) if value is not None]
    if not given:
        raise InputError(f"by how much? give {', '.join(names[:-1])} or {names[-1]}")
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other; give one of them")


def at_least(option: str, value: int | None, least: int) -> None:
    """`value` is `least` or more, or was not given."""
    if value is not None and value < least:
        raise InputError(f"{option} {value} is too small; {least} is the least")


def seed(value: int) -> int:
    """In 0 to 2⁶³ − 1, what a random generator takes."""
    if not 0 <= value < 2**63:
        raise InputError(f"--seed {value} is outside 0 to 2^63 - 1; any small number does")
    return value


def out_directory(path: Path) -> None:
    """Absent, or an empty folder; and it can be made."""
    if path.is_dir():
        if any(path.iterdir()):
            raise InputError(f"--out {path} exists and is not empty; name a new folder or empty this one")
        parent = path
    elif path.exists() or path.is_symlink():
        raise InputError(f"--out {path} is not a folder; name a new folder")
    else:
        parent = next(folder for folder in path.absolute().parents if folder.exists())
    _writable(parent, f"--out {path}")


def out_file(option: str, path: Path | None) -> None:
    """Absent or an ordinary file, in a folder that exists and can be written to; `-` is standard output."""
    if path is None or path == STANDARD_OUTPUT:
        return
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path} is not an ordinary file; '-' writes to standard output")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}; make it first")
    _writable(path.parent, f"{option} {path}")


def new_file(option: str, path: Path) -> None:
    """As `out_file`, and not there."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{option} {path} exists; name a new file")
    out_file(option, path)


def text_source(option: str, source: str) -> None:
    """A file that is there and not empty, or the name of a known text (which the API looks up)."""
    path = Path(source).expanduser()
    if not source.strip():
        raise InputError(f"{option} is empty; name a file ({', '.join(TEXT_SUFFIXES)}) or a data set such as wikitext2")
    if path.is_file():
        if path.suffix.lower() not in TEXT_SUFFIXES:
            raise InputError(f"{option} {source}: the kinds of file read are {', '.join(TEXT_SUFFIXES)}")
        if path.stat().st_size == 0:
            raise InputError(f"{option} {source} is empty; give a file with text in it")
    elif path.is_dir():
        raise InputError(f"{option} {source} is a folder; name one file in it")
    elif path.suffix.lower() in TEXT_SUFFIXES or source[0] in "./~":
        raise InputError(f"{option} {source}: there is no such file")


def task_files(files: list[str], option: str = "--tasks") -> None:
    """Every one a `.jsonl` file that is there."""
    for file in files:
        path = Path(file).expanduser()
        if path.suffix.lower() != ".jsonl":
            raise InputError(f"{option} {file}: a task is a .jsonl file")
        if not path.is_file():
            raise InputError(f"{option} {file}: there is no such file")


def pattern_sources(paths: list[Path], option: str = "--patterns") -> None:
    """Every one a `.toml` file or a folder that has some."""
    for path in paths:
        if path.is_dir():
            if not any(path.glob("*.toml")):
                raise InputError(f"{option} {path}: there is no .toml file in this folder")
        elif not path.is_file():
            raise InputError(f"{option} {path}: there is no such file or folder")
        elif path.suffix != ".toml":
            raise InputError(f"{option} {path}: a pattern file ends in .toml")


def _writable(folder: Path, what: str) -> None:
    """Asks by doing: permission bits do not tell for the superuser, nor on read-only or network file systems."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{what} cannot be written: {folder}: {error.strerror or error}") from None
