"""What cannot be saved or loaded is told in one line, leaves nothing behind, and runs nothing."""

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modegpt_graph.checkpoint import is_compressed, load
from modegpt_graph.checkpoint.folder import written_whole
from modegpt_graph.errors import InputError, ModegptError

from .conftest import Compressed, Saved


@pytest.fixture
def folder(saved: Mapping[str, Saved], tmp_path: Path) -> Path:
    """A copy of a saved model, to be damaged."""
    return shutil.copytree(saved["llama"].directory, tmp_path / "model")


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text
    return text


def change_json(file: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(lambda: load(tmp_path / "nothing")) == f"there is no folder {tmp_path / 'nothing'}"
    assert not is_compressed(tmp_path / "nothing")


def test_a_model_that_is_not_compressed(tiny_folder: Path) -> None:
    assert "is no compressed model" in refusal(lambda: load(tiny_folder))
    assert not is_compressed(tiny_folder)


def test_a_plan_of_a_newer_version(folder: Path) -> None:
    change_json(folder / "plan.json", lambda plan: plan.update(schema_version=2, novelty=1))
    assert "newer modegpt-graph" in refusal(lambda: load(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', "\x00", "[" * 100_000])
def test_a_damaged_plan(folder: Path, text: str) -> None:
    (folder / "plan.json").write_text(text)
    assert "plan.json" in refusal(lambda: load(folder))


def test_an_unknown_entry_in_the_plan(folder: Path) -> None:
    change_json(folder / "plan.json", lambda plan: plan.update(extra=1))
    assert "extra" in refusal(lambda: load(folder))


def test_a_formula_that_is_none(folder: Path) -> None:
    change_json(folder / "plan.json", lambda plan: plan["patterns"][0].update(formula="down("))
    assert "plan.json" in refusal(lambda: load(folder))


def test_no_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in refusal(lambda: load(folder))


def test_a_configuration_of_another_model(folder: Path, saved: Mapping[str, Saved]) -> None:
    shutil.copy(saved["opt"].directory / "config.json", folder)
    assert "OPTForCausalLM" in refusal(lambda: load(folder))


def test_a_site_that_is_not_found_again_names_both_versions(folder: Path) -> None:
    def change(plan: Any) -> None:
        plan["patterns"] = [pattern for pattern in plan["patterns"] if pattern["name"] != "query-key"]
        plan["versions"]["transformers"] = "5.0.0"

    change_json(folder / "plan.json", change)
    text = refusal(lambda: load(folder))
    assert "query-key is not found again" in text
    assert "transformers 5.0.0 (here 5." in text


def test_a_plan_that_says_other_sizes(folder: Path) -> None:
    def change(plan: Any) -> None:
        first = next(module for module in plan["modules"] if module["linears"])
        next(iter(first["linears"].values()))["out_features"] += 1

    change_json(folder / "plan.json", change)
    assert "other modules than planned" in refusal(lambda: load(folder))


@pytest.mark.parametrize("damage", ["gone", "missing", "repeated", "far", "negative", "other type", "no tensors"])
def test_damaged_selections(folder: Path, damage: str) -> None:
    file = folder / "selections.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if damage == "gone":
        file.unlink()
    elif damage == "no tensors":
        file.write_bytes(b"nothing")
    else:
        if damage == "missing":
            del tensors[name]
        elif damage == "repeated":
            tensors[name][0, 0] = tensors[name][0, 1]
        elif damage == "far":
            tensors[name][0, 0] = 1000
        elif damage == "negative":
            tensors[name][0, 0] = -1
        else:
            tensors[name] = tensors[name].to(torch.int32)
        save_file(tensors, file)
    assert "selection" in refusal(lambda: load(folder))


@pytest.mark.parametrize("damage", ["gone", "missing", "unexpected", "other shape", "cut short"])
def test_weights_that_do_not_fit(folder: Path, damage: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if damage == "gone":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        name = "model.layers.0.mlp.down_proj.weight"
        if damage == "missing":
            del tensors[name]
        elif damage == "unexpected":
            tensors["other"] = torch.ones(1)
        else:
            tensors[name] = tensors[name][:, 1:].contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    assert "weights" in refusal(lambda: load(folder))


def test_no_factory_is_taken_for_a_transformers_model(folder: Path) -> None:
    assert "needs no factory" in refusal(lambda: load(folder, lambda: None))  # type: ignore[arg-type]


def test_loading_runs_nothing_from_the_folder(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    poison = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("modeling_compressed.py", "configuration_compressed.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(poison)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(poison)

    def lead_there(config: Any) -> None:
        config["auto_map"] = {
            "AutoConfig": "configuration_compressed.Configuration",
            "AutoModelForCausalLM": "modeling_compressed.Model",
        }

    change_json(folder / "config.json", lead_there)
    ids = torch.tensor([[3, 4, 5]])
    loaded: Any = load(folder)
    loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert not marker.exists()


class _Runs:
    """An object whose unpickling writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_pickles_are_never_read(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(marker)))
    assert "weights" in refusal(lambda: load(folder))
    change_json(folder / "config.json", lambda config: config.update(transformers_weights="pytorch_model.bin"))
    assert "weights" in refusal(lambda: load(folder))
    assert not marker.exists()


def test_a_folder_that_is_taken_is_left_as_it_is(small_llama: Compressed, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("text")
    (tmp_path / "file").write_text("text")
    assert "is not empty" in refusal(lambda: small_llama.save(tmp_path / "mine"))
    assert "is not a folder" in refusal(lambda: small_llama.save(tmp_path / "file"))
    assert {file.name for file in tmp_path.rglob("*")} == {"mine", "file"}
    assert (tmp_path / "file").read_text() == "text"


def test_an_empty_folder_and_missing_parents_are_no_hindrance(small_llama: Compressed, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert is_compressed(small_llama.save(tmp_path / "empty"))
    assert is_compressed(small_llama.save(tmp_path / "not" / "there" / "yet"))


class _FailsHalfway:
    """A tokenizer whose saving writes one file and then fails, as on a full disk."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, directory: Path) -> None:
        assert (directory / "model.safetensors").is_file()
        (directory / "tokenizer.json").write_text("{")
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("other"), KeyboardInterrupt()])
def test_what_is_half_written_does_not_stay(small_llama: Compressed, tmp_path: Path, error: BaseException) -> None:
    config = small_llama.model.config
    expected = ModegptError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        small_llama.save(tmp_path / "not" / "there" / "out", _FailsHalfway(error))
    assert not any(tmp_path.iterdir())
    assert small_llama.model.config is config
    assert is_compressed(small_llama.save(tmp_path / "out"))


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def stop() -> None:
        with written_whole(tmp_path / "out") as working:
            (working / "file").write_text("text")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop()
    assert not any(tmp_path.iterdir())


def test_a_folder_that_was_taken_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    def write() -> None:
        with written_whole(tmp_path / "out") as working:
            (working / "file").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("theirs")

    assert "is not empty" in refusal(write)
    assert [(file.name, file.read_text()) for file in (tmp_path / "out").iterdir()] == [("file", "theirs")]


def test_the_folder_has_the_permissions_of_any_new_one(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with written_whole(tmp_path / "out") as working:
        (working / "file").write_text("text")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {file.name for file in tmp_path.iterdir()} == {"plain", "out"}
