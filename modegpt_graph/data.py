"""Where the data files are: beside the package in a source checkout, inside it in an installed wheel."""

from pathlib import Path

from modegpt_graph.errors import ModegptError


def patterns_directory() -> Path:
    """The folder of pattern files (`*.toml`)."""
    return _directory("patterns")


def architectures_directory() -> Path:
    """The folder of public configurations (`*.json`)."""
    return _directory("architectures")


def _directory(name: str) -> Path:
    package = Path(__file__).resolve().parent
    checkout = package.parent
    # An unrelated folder of that name may stand beside an installed package: only a checkout has the build file too.
    candidates = [package / name] + ([checkout / name] if (checkout / "pyproject.toml").is_file() else [])
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise ModegptError(f"the data folder {name!r} is missing from the installation; reinstall modegpt-graph")
