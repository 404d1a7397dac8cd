"""A compressed model as a program of torch.export: the same logits where only torch is, or nothing is written."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures import invented
from torch import Tensor, nn

from modegpt_graph import api
from modegpt_graph.checkpoint.program import export_program
from modegpt_graph.errors import InputError, ModegptError
from modegpt_graph.models import forward_logits
from modegpt_graph.models.build import random_model

from .conftest import VOCABULARY, compressed, configuration

ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
assert not {"transformers", "modegpt_graph"} & set(sys.modules)
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_the_program_gives_the_models_logits_where_only_torch_is(tmp_path: Path) -> None:
    """For a batch of one, which the tracer takes for a constant where it can."""
    found = compressed(random_model(configuration("llama"), seed=0, max_layers=2))
    found.save(tmp_path / "small")
    program = api.export(tmp_path / "small", "torch-export", tmp_path / "small.pt2")
    assert program.max_relative_error <= 1e-5
    assert program.bytes == (tmp_path / "small.pt2").stat().st_size
    tokens = torch.randint(VOCABULARY, (1, 23), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp_path / "tokens.pt")
    words = [
        sys.executable,
        "-I",
        "-c",
        ALONE,
        *(str(tmp_path / name) for name in ("small.pt2", "tokens.pt", "out.pt")),
    ]
    subprocess.run(words, check=True)
    with torch.no_grad():
        expected = forward_logits(found.model, tokens)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt").detach(), expected, atol=1e-5, rtol=1e-5)


def test_a_module_that_is_not_from_transformers_is_exported_too(tmp_path: Path) -> None:
    module, _ = invented.gated_attention()
    assert export_program(module, tmp_path / "own.pt2").shape == (3, 17)


class Branching(nn.Module):
    """What it does depends on values, or on the length."""

    def __init__(self, on_length: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.on_length = nn.Embedding(31, 8), nn.Linear(8, 31), on_length

    def forward(self, tokens: Tensor) -> Tensor:
        value = self.head(self.embedding(tokens))
        if self.on_length:
            return value * 2 if tokens.shape[1] == 11 else value
        return value * 2 if float(value.sum()) > 0 else value


@pytest.mark.parametrize(
    ("on_length", "message"),
    [(False, "torch.export cannot follow this model"), (True, "does not run on 3 sequences of 17 tokens")],
)
def test_what_is_not_the_model_is_not_written(tmp_path: Path, on_length: bool, message: str) -> None:
    with pytest.raises(ModegptError, match=message):
        export_program(Branching(on_length), tmp_path / "branching.pt2")
    assert list(tmp_path.iterdir()) == []


def test_formats_folders_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there.pt2").write_bytes(b"x")
    with pytest.raises(InputError, match=r"there.pt2 exists; name a new file"):
        export_program(Branching(False), tmp_path / "there.pt2")
    with pytest.raises(InputError, match="unknown format 'gguf'; known: torch-export"):
        api.export(tmp_path, "gguf", tmp_path / "new.pt2")
    with pytest.raises(InputError, match="holds no compressed model"):
        api.export(tmp_path, "torch-export", tmp_path / "new.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]
