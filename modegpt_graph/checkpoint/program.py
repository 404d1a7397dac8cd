"""A compressed model as one file of torch.export: a program from token ids to logits that needs only torch.

The file is a zip archive: the graph as JSON, the weights as plain bytes. The sample inputs, which torch keeps as a
pickle, are left empty.
"""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modegpt_graph.errors import InputError, ModegptError
from modegpt_graph.models import device_of, forward_logits, positions_of, vocabulary_of
from modegpt_graph.models.source import one_line

FORMATS = {"torch-export": ".pt2"}
TRACED, OTHER = (2, 11), (3, 17)  # (B, S): sizes that nothing in a model has, so that none is taken for a constant
LEAST_TOLERANCE, ROUNDINGS = 1e-4, 8  # of the largest logit: an absolute share, or roundings of the number format


@dataclass(frozen=True)
class Program:
    """A program file. shape: (B, S) of the token ids that it was checked on, which is not the traced one.

    max_relative_error: largest difference of a logit from the model's, over the model's largest.
    """

    path: Path
    bytes: int
    shape: tuple[int, int]
    max_relative_error: float


class _Logits(nn.Module):
    """(B, S) token ids to (B, S, V) logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return forward_logits(self.model, input_ids)


def export_program(model: nn.Module, path: Path) -> Program:
    """Write `model` as a program of batches of any size and length, once it gives the model's own logits.

    The program keeps no cache between calls. It is read from its file and checked before the file has its name.
    Raises InputError where `path` is taken or cannot be written, ModegptError where torch.export cannot follow the
    model, or the program is not the model.
    """
    path = path.expanduser().absolute()
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists; name a new file")
    try:
        working = tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    with working as folder:
        file = Path(folder) / path.name  # the archive has its file's name within
        _write(model, file)
        shape, error = _difference(model, file)
        if not error <= max(LEAST_TOLERANCE, ROUNDINGS * torch.finfo(next(model.parameters()).dtype).eps):
            raise ModegptError(f"the exported program is not the model: logits differ by {error:.1e} of the largest")
        file.replace(path)
    return Program(path, path.stat().st_size, shape, error)


def _write(model: nn.Module, path: Path) -> None:
    free = torch.export.Dim.AUTO
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                _Logits(model),
                (_tokens(model, TRACED),),
                dynamic_shapes={"input_ids": {0: free, 1: free}},
                strict=False,
            )
        except Exception as error:  # what torch raises where it cannot follow a model is of many kinds
            raise ModegptError(f"torch.export cannot follow this model: {one_line(error)}") from error
        program.example_inputs = None  # they would be a pickle
        torch.export.save(program, path)


def _difference(model: nn.Module, path: Path) -> tuple[tuple[int, int], float]:
    """((B, S), largest relative difference of a logit) on a shape that was not traced."""
    tokens = _tokens(model, OTHER)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.load(path).module()
        try:
            found = program(tokens)
        except (RuntimeError, AssertionError) as error:
            what = f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens"
            raise ModegptError(f"the exported program does not run on {what}: {one_line(error)}") from error
        expected = forward_logits(model, tokens)
    error = (found - expected).abs().max() / expected.abs().max()
    return (tokens.shape[0], tokens.shape[1]), float(error)


def _tokens(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Token ids of a batch, no longer than the model's positions."""
    batch, length = shape
    length = min(length, positions_of(model) or length)
    ids = torch.randint(vocabulary_of(model), (batch, length), generator=torch.Generator().manual_seed(0))
    return ids.to(device_of(model))
