"""Compressed models, run in a process that has torch and transformers but not this package."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# Run in a process of its own, in which this package cannot be imported, wherever it is installed.
ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modegpt_graph":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import modegpt_graph
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package can be imported here: this test would show nothing")

import json
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
given = load_file(root / "given.safetensors")
found = {}
for name, choices in json.loads((root / "models.json").read_text()).items():
    dtype = choices.pop("dtype", None)
    extra = {"dtype": getattr(torch, dtype)} if dtype else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        choices["directory"], trust_remote_code=True, device_map=choices.get("device_map"), output_loading_info=True,
        **extra
    )
    assert not any(info.values()), info
    with torch.no_grad():
        found[f"{name}/logits"] = model(given["ids"], attention_mask=given["mask"]).logits
    found[f"{name}/generated"] = model.generate(
        given["ids"], attention_mask=given["mask"], max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    if choices.get("again"):
        model.save_pretrained(choices["again"])
save_file(found, root / "found.safetensors")
assert not [name for name in sys.modules if name.partition(".")[0] == "modegpt_graph"]
"""


def given() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"ids": ids.masked_fill(mask == 0, 0), "mask": mask}


def run_alone(root: Path, models: Mapping[str, Mapping[str, str]]) -> dict[str, torch.Tensor]:
    save_file(given(), root / "given.safetensors")
    (root / "models.json").write_text(json.dumps(models))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ALONE, str(root)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(root / "found.safetensors")
