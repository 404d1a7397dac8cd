"""Modules that are not from the transformers library: weights and plan, loaded into what their factory makes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modegpt_graph.checkpoint import load
from modegpt_graph.errors import InputError

from .conftest import Compressed, compressed

SOURCE = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.wide = nn.Linear(16, 40)
        self.narrow = nn.Linear(40, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x):
        b, s, _ = x.shape
        query, key, value = (part(self.norm(x)).view(b, s, 2, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(b, s, 16))
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))


class Decoder(nn.Module):
    """Reads and writes with one matrix."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 31, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make():
    torch.manual_seed(0)
    return Decoder().eval(), (torch.zeros(1, 5, dtype=torch.long),)
'''


@pytest.fixture
def factory_file(tmp_path: Path) -> Path:
    (tmp_path / "decoder.py").write_text(SOURCE)
    return tmp_path / "decoder.py"


@pytest.fixture
def plain(factory_file: Path) -> Compressed:
    namespace: dict[str, Any] = {"__name__": "decoder"}
    exec(compile(SOURCE, str(factory_file), "exec"), namespace)
    model, example_inputs = namespace["make"]()
    return compressed(model.requires_grad_(False), example_inputs=example_inputs)


def tokens() -> Tensor:
    return torch.randint(0, 31, (3, 6), generator=torch.Generator().manual_seed(0))


def test_a_plain_module_comes_back_bit_for_bit(plain: Compressed, factory_file: Path, tmp_path: Path) -> None:
    directory = plain.save(tmp_path / "out")
    assert {file.name for file in directory.iterdir()} == {
        "model.safetensors",
        "plan.json",
        "selections.safetensors",
        "report.json",
    }
    loaded: Any = load(directory, f"{factory_file}:make")
    assert torch.equal(loaded(tokens()), plain.model(tokens()))
    assert loaded.head.weight is loaded.embedding.weight
    assert sum(p.numel() for p in loaded.parameters()) < sum(v.numel() for v in plain.dense.values())
    assert type(loaded.blocks[0].wide) is nn.Linear
    assert loaded.blocks[0].wide.out_features < 40


def test_a_factory_can_be_a_function(plain: Compressed, tmp_path: Path) -> None:
    directory = plain.save(tmp_path / "out")
    maker = type(plain.model)
    loaded = load(directory, lambda: (maker(), (torch.zeros(1, 5, dtype=torch.long),)))
    assert torch.equal(loaded(tokens()), plain.model(tokens()))


def test_the_stored_dtype_is_kept_and_another_can_be_asked_for(
    plain: Compressed, factory_file: Path, tmp_path: Path
) -> None:
    plain.model.to(torch.bfloat16)
    directory = plain.save(tmp_path / "out")
    loaded = load(directory, f"{factory_file}:make")
    assert torch.equal(loaded(tokens()), plain.model(tokens()))
    assert load(directory, f"{factory_file}:make", dtype=torch.float64)(tokens()).dtype == torch.float64


def test_the_factory_is_asked_for(plain: Compressed, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the factory"):
        load(plain.save(tmp_path / "out"))


def test_a_factory_of_another_module_is_refused(plain: Compressed, factory_file: Path, tmp_path: Path) -> None:
    directory = plain.save(tmp_path / "out")
    factory_file.write_text(SOURCE.replace("40", "24"))
    with pytest.raises(InputError, match=r"does not fit|other modules than planned"):
        load(directory, f"{factory_file}:make")
    factory_file.write_text(SOURCE.replace("31", "33"))
    with pytest.raises(InputError, match="does not fit"):
        load(directory, f"{factory_file}:make")


def test_what_is_no_factory_is_refused(plain: Compressed, tmp_path: Path) -> None:
    directory = plain.save(tmp_path / "out")
    with pytest.raises(InputError, match="must return"):
        load(directory, lambda: plain.model)  # type: ignore[arg-type]
