"""What calibration found, kept on disk for the next run with the same model, text and code.

One safetensors file for each, in the user's cache folder, under a key of everything that the figures depend on. What
does not read as it was written is measured again. The oldest files make room for new ones.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modegpt_graph.calibrate.inputs import ValueStatistics
from modegpt_graph.calibrate.norms import NormStatistics
from modegpt_graph.calibrate.observe import Calibrated
from modegpt_graph.calibrate.statistics import ConsumerStatistics, ExpertStatistics, ScoreStatistics, Statistics
from modegpt_graph.models.cache import cache_directory

FORMAT = "modegpt-graph calibration"
LARGEST = 4_000_000_000  # bytes of all files together
OTHER = "other "  # before a site, for what it saw of the other text
LEAST_SECONDS = 5.0  # what took less is not worth a file
KINDS = {
    kind.__name__: kind
    for kind in (ConsumerStatistics, ValueStatistics, ExpertStatistics, ScoreStatistics, NormStatistics)
}


@dataclass(frozen=True)
class Found:
    """What an earlier run left. seconds: that it took then."""

    calibrated: Calibrated
    seconds: float


@dataclass(frozen=True)
class Store:
    """Files of one folder. directory: made when there is something to write."""

    directory: Path

    @staticmethod
    def default() -> "Store":
        """In the user's cache folder."""
        return Store(cache_directory() / "calibrations")

    def statistics(self, key: str, sites: Iterable[str]) -> Found | None:
        """What was kept under `key` for exactly these sites; None where there is nothing sound."""
        read = self._read(self.directory / f"{key}.safetensors")
        if read is None:
            return None
        metadata, tensors = read
        try:
            kinds: dict[str, str] = json.loads(metadata["kinds"])
            if {name for name in kinds if not name.startswith(OTHER)} != set(sites):
                return None
            found = {name: _statistics(kind, name, tensors) for name, kind in kinds.items()}
            other = {name.removeprefix(OTHER): found.pop(name) for name in kinds if name.startswith(OTHER)}
            tokens, followed = int(metadata["tokens"]), int(metadata["followed"])
            calibrated = Calibrated(found, tensors["importance"], tokens, other, followed)
            return Found(calibrated, float(metadata["seconds"]))
        except (KeyError, TypeError, ValueError, RuntimeError):
            return None

    def keep_statistics(self, key: str, calibrated: Calibrated, seconds: float) -> None:
        """Keep what took `seconds`; nothing where that was little, or where it does not fit or cannot be written."""
        if seconds < LEAST_SECONDS:
            return
        tensors, kinds = {"importance": calibrated.importance}, {}
        other = {f"{OTHER}{site}": statistics for site, statistics in calibrated.other.items()}
        for site, statistics in {**calibrated.statistics, **other}.items():
            kinds[site] = type(statistics).__name__
            for field in dataclasses.fields(statistics):
                value = getattr(statistics, field.name)
                parts = value if isinstance(value, tuple) else () if value is None else (value,)
                for number, part in enumerate(parts):
                    tensors |= _packed(f"{site}\n{field.name}\n{number}", part)
        metadata = {"kinds": json.dumps(kinds), "tokens": str(calibrated.tokens), "followed": str(calibrated.followed)}
        self._write(key, tensors, metadata, seconds)

    def numbers(self, key: str, names: Iterable[str]) -> tuple[dict[str, float], float] | None:
        """Numbers that were kept under `key` for exactly these names, and the seconds they took."""
        read = self._read(self.directory / f"{key}.safetensors")
        if read is None:
            return None
        metadata, tensors = read
        try:
            found = dict(zip(json.loads(metadata["names"]), tensors["numbers"].tolist(), strict=True))
            return (found, float(metadata["seconds"])) if set(found) == set(names) else None
        except (KeyError, TypeError, ValueError):
            return None

    def keep_numbers(self, key: str, numbers: Mapping[str, float], seconds: float) -> None:
        """As `keep_statistics`."""
        if seconds >= LEAST_SECONDS:
            values = torch.tensor(list(numbers.values()), dtype=torch.float64)
            self._write(key, {"numbers": values}, {"names": json.dumps(list(numbers))}, seconds)

    def _read(self, path: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            os.utime(path)  # the one that was used last goes last
        except (OSError, safetensors.SafetensorError):
            return None
        known = metadata.get("format") == FORMAT and metadata.get("key") == path.stem
        return (metadata, tensors) if known and metadata.get("digest") == _digest(tensors) else None

    def _write(self, key: str, tensors: dict[str, Tensor], metadata: dict[str, str], seconds: float) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > LARGEST:
            return
        said = {"format": FORMAT, "key": key, "digest": _digest(tensors), "seconds": str(seconds)} | metadata
        with suppress(OSError, safetensors.SafetensorError):  # a full disk: the next run measures again
            self.directory.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=self.directory) as working:
                save_file(tensors, Path(working) / "whole", metadata=said)
                (Path(working) / "whole").replace(self.directory / f"{key}.safetensors")

    def _make_room(self, size: int) -> None:
        files = sorted(self.directory.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        total = sum(file.stat().st_size for file in files)
        for file in files:
            if total + size <= LARGEST:
                break
            total -= file.stat().st_size
            file.unlink()


def run_key(model: nn.Module, graph: str, texts: Iterable[Tensor], *parts: object) -> str:
    """A key of the model's weights, its traced graph, the calibration texts, this package's own code and `parts`."""
    found = hashlib.blake2b(digest_size=20)
    for name, value in model.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(_bytes(value))
    for tokens in texts:
        found.update(f"{tuple(tokens.shape)}".encode())
        found.update(_bytes(tokens))
    for part in (graph, torch.__version__, _code(), *parts):
        found.update(f"\0{part}".encode())
    return found.hexdigest()


@cache
def _code() -> str:
    """A digest of this package's source: figures of other code are not its own."""
    found = hashlib.blake2b(digest_size=20)
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=20)
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(_bytes(tensors[name]))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A symmetric matrix by its lower triangle, exactly; any other tensor as it is."""
    if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] and torch.equal(tensor, tensor.T):
        size = tensor.shape[0]
        rows, columns = torch.tril_indices(size, size)
        return {f"{name}\n{size}": tensor[rows, columns]}
    return {f"{name}\n": tensor.contiguous()}


def _unpacked(name: str, tensor: Tensor) -> Tensor:
    size = name.rpartition("\n")[2]
    if not size:
        return tensor
    full = tensor.new_empty(int(size), int(size))
    rows, columns = torch.tril_indices(int(size), int(size))
    full[rows, columns] = tensor
    full[columns, rows] = tensor
    return full


def _statistics(kind: str, site: str, tensors: Mapping[str, Tensor]) -> Statistics:
    """The statistics of a site. Raises KeyError or TypeError where something of it is missing."""
    found: dict[str, list[Tensor]] = {}
    own = sorted((name for name in tensors if name.startswith(f"{site}\n")), key=lambda name: int(name.split("\n")[2]))
    for name in own:
        found.setdefault(name.split("\n")[1], []).append(_unpacked(name, tensors[name]))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(KINDS[kind]):
        parts = found.get(field.name)
        if "tuple" in str(field.type):
            values[field.name] = tuple(parts or ())
        elif parts is None and "None" not in str(field.type):
            raise KeyError(field.name)
        else:
            values[field.name] = parts[0] if parts else None
    return KINDS[kind](**values)
