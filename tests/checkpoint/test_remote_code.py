"""An original whose classes are code in its own folder: run where the user says so, and only there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modegpt_graph

from .alone import given, run_alone

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own-model"
"""
HELPER = """
def double(x):
    return 2 * x
"""
MODEL = """
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_own import OwnConfig
from .helper_own import double


class OwnMLP(LlamaMLP):
    def forward(self, x):
        return double(super().forward(x))


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OwnMLP(config)
"""
FIGURES = {
    "model_type": "own-model",
    "architectures": ["OwnForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "dtype": "float32",
    "auto_map": {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    },
}
# Run in a process of its own: what the library learns of such classes, it keeps for the whole process.
COMPRESS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from modegpt_graph.checkpoint import load, save
from modegpt_graph.errors import InputError
from modegpt_graph.match.prepare import read_patterns, survey_model
from modegpt_graph.models import resolve
from modegpt_graph.rewrite.apply import rewrite
from modegpt_graph.rewrite.solution import Solution

root = Path(sys.argv[1])
given = load_file(root / "given.safetensors")
torch.manual_seed(0)
config = AutoConfig.from_pretrained(root / "original", trust_remote_code=True)
AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(root / "original")
source = resolve(root / "original", trust_remote_code=True)
model = source.load()
surveyed = survey_model(source, read_patterns())
modules = surveyed.modules()
solutions = {
    placed.site.id: Solution(
        tuple(torch.arange(kind.count // 2).repeat(placed.footprint.layout.groups, 1) + 1
              for kind in placed.footprint.layout.kinds)
    )
    for one in modules for placed in one.placed
}
assert len(solutions) == 6
rewritten = rewrite(model, modules, solutions)
save(root / "out", model, rewritten, solutions, surveyed.patterns, source)
loaded = load(root / "out", trust_remote_code=True)
with torch.no_grad():
    logits = [one(given["ids"], attention_mask=given["mask"]).logits for one in (model, loaded)]
save_file({"model": logits[0], "loaded": logits[1]}, root / "logits.safetensors")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the original, the compressed model in `out`, and the logits that it gave."""
    root = tmp_path_factory.mktemp("remote")
    (root / "original").mkdir()
    (root / "original" / "configuration_own.py").write_text(CONFIGURATION)
    (root / "original" / "helper_own.py").write_text(HELPER)
    (root / "original" / "modeling_own.py").write_text(MODEL)
    (root / "original" / "config.json").write_text(json.dumps(FIGURES))
    save_file(given(), root / "given.safetensors")
    environment = os.environ | {
        "PYTHONPATH": str(Path(modegpt_graph.__file__).parents[1]),
        "HF_MODULES_CACHE": str(root / "first-cache"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", COMPRESS, str(root)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def test_it_is_loaded_where_its_code_is_trusted(root: Path) -> None:
    logits = load_file(root / "logits.safetensors")
    assert torch.equal(logits["model"], logits["loaded"])


def test_it_is_loaded_without_this_package(root: Path) -> None:
    found: dict[str, Any] = run_alone(root, {"own": {"directory": str(root / "out")}})
    assert torch.equal(found["own/logits"], load_file(root / "logits.safetensors")["model"])


def test_its_code_is_not_run_unless_trusted(root: Path) -> None:
    from modegpt_graph.checkpoint import load
    from modegpt_graph.errors import InputError

    for file in (root / "out").glob("*.py"):
        file.write_text(f"open({str(root / 'ran')!r}, 'w').close()\n" + file.read_text())
    with pytest.raises(InputError, match="custom code"):
        load(root / "out")
    assert not (root / "ran").exists()
