"""Models that several tests share: the demo model with its real weights, and tiny random ones."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modegpt_graph.models import ModelSource, resolve

sys.path.insert(0, str(Path(__file__).parent))  # `from fixtures import …`: the models that the rooms share


if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))  # tests side by side share the cores


@pytest.fixture(scope="session")
def demo_source() -> ModelSource:
    return resolve("demo")


@pytest.fixture(scope="session")
def demo(demo_source: ModelSource) -> nn.Module:
    """The demo model in float32, shared by all tests: leave it as it is."""
    return demo_source.load()


@pytest.fixture(scope="session")
def demo_tokenizer(demo_source: ModelSource) -> Any:
    return demo_source.tokenizer()


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """Builds a random two-layer decoder with grouped queries; configuration figures can be given."""

    def build(seed: int = 0, **figures: Any) -> nn.Module:
        return _tiny(seed, **figures)

    return build


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder as `save_pretrained` writes it, with weights and without a tokenizer."""
    model: Any = _tiny(seed=0)
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def _tiny(seed: int, **figures: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(shape | figures))).eval().requires_grad_(False)
