"""Tiny random models, made smaller with random selections and saved."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modegpt_graph.checkpoint import load, save
from modegpt_graph.match.patterns import Pattern
from modegpt_graph.match.prepare import read_patterns, survey_model
from modegpt_graph.match.site_module import SiteModule
from modegpt_graph.models import ModelSource, resolve
from modegpt_graph.models.build import random_model
from modegpt_graph.rewrite.apply import RewrittenModule, rewrite
from modegpt_graph.rewrite.solution import Solution, shuffled

VOCABULARY = 64


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A model that was rewritten in memory, and what saving it takes."""

    source: ModelSource
    dense: dict[str, Tensor]
    model: Any
    rewritten: tuple[RewrittenModule, ...]
    solutions: Mapping[str, Solution]
    patterns: tuple[Pattern, ...]

    def save(self, directory: Path, tokenizer: Any = None) -> Path:
        save(
            directory,
            self.model,
            self.rewritten,
            self.solutions,
            self.patterns,
            self.source,
            tokenizer,
            {"sites": len(self.solutions)},
        )
        return directory


@dataclasses.dataclass(frozen=True)
class Saved(Compressed):
    directory: Path = Path()


def configuration(family: str) -> Any:
    from transformers import GemmaConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig, PhiConfig

    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if family == "llama":
        return LlamaConfig(hidden_size=32, intermediate_size=48, num_key_value_heads=2, **shape)
    if family == "opt":
        return OPTConfig(hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **shape)
    if family == "gemma":
        return GemmaConfig(hidden_size=32, intermediate_size=48, num_key_value_heads=1, head_dim=8, **shape)
    if family == "phi":
        rotary: dict[str, Any] = {"partial_rotary_factor": 0.5}
        return PhiConfig(hidden_size=64, intermediate_size=48, **shape, **rotary)
    if family == "gpt_neox":
        return GPTNeoXConfig(hidden_size=64, intermediate_size=48, **shape)
    assert family == "gpt2"
    return GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=None)


FAMILIES = ("llama", "opt", "gemma", "phi", "gpt_neox", "gpt2")


def random_part(modules: tuple[SiteModule, ...], seed: int = 0) -> dict[str, Solution]:
    """About two thirds of the blocks of every site, another share in every site, ascending."""
    generator = torch.Generator().manual_seed(seed)
    solutions = {}
    for number, placed in enumerate(placed for one in modules for placed in one.placed):
        layout = placed.footprint.layout
        kept = []
        for kind in layout.kinds:
            count = max(1, kind.count * (6 + number % 3) // 10)
            kept.append(
                torch.stack(
                    [
                        torch.randperm(kind.count, generator=generator)[:count].sort().values
                        for _ in range(layout.groups)
                    ]
                )
            )
        solutions[placed.site.id] = Solution(tuple(kept))
    return solutions


def full_rank(modules: tuple[SiteModule, ...]) -> dict[str, Solution]:
    """Every block of every site, in random order."""
    generator = torch.Generator().manual_seed(0)
    return {placed.site.id: shuffled(placed.footprint.layout, generator) for one in modules for placed in one.placed}


def compressed(
    model: nn.Module, choose: Any = random_part, example_inputs: Any = None, patterns: Any = None
) -> Compressed:
    source = resolve(model, example_inputs=example_inputs)
    surveyed = survey_model(source, patterns or read_patterns())
    modules = surveyed.modules()
    solutions = choose(modules)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    rewritten = rewrite(model, modules, solutions)
    return Compressed(source, dense, model, rewritten, solutions, surveyed.patterns)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Saved]:
    """Family → a tiny float32 model, made smaller and saved; shared by all tests, leave it as it is."""
    root = tmp_path_factory.mktemp("compressed")
    models = {}
    for family in FAMILIES:
        one = compressed(random_model(configuration(family), seed=1, max_layers=2))
        models[family] = Saved(**vars(one), directory=one.save(root / family))
    return models


@pytest.fixture
def small_llama(saved: Mapping[str, Saved]) -> Compressed:
    """A copy of a model that was made smaller, for tests that change it."""
    return dataclasses.replace(saved["llama"], model=copy.deepcopy(saved["llama"].model))


@pytest.fixture(scope="session")
def loaded(saved: Mapping[str, Saved]) -> Mapping[str, Any]:
    """Family → the saved model, loaded; shared by all tests, leave it as it is."""
    return {family: load(one.directory) for family, one in saved.items()}
