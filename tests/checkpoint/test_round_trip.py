"""What is loaded is what was saved: bit for bit, through the library's own generation too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modegpt_graph.checkpoint import is_compressed, load
from modegpt_graph.match.prepare import read_patterns
from modegpt_graph.models import cache_of
from modegpt_graph.models.build import model_of, random_model

from .conftest import FAMILIES, VOCABULARY, Compressed, Saved, compressed, configuration, full_rank

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_compressed.py",
    "plan.json",
    "report.json",
    "selections.safetensors",
}


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three rows of token ids, one padded on the left, and their attention mask."""
    ids = torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids.masked_fill(mask == 0, 0), mask


def behaviour(model: Any) -> dict[str, Tensor]:
    ids, mask = tokens()
    with torch.no_grad():
        outputs = {"logits": model(ids).logits, "padded": model(ids, attention_mask=mask).logits}
        common = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0}
        outputs["greedy"] = model.generate(ids, do_sample=False, **common)
        outputs["without cache"] = model.generate(ids, do_sample=False, use_cache=False, **common)
        torch.manual_seed(3)
        outputs["sampled"] = model.generate(ids, do_sample=True, temperature=1.5, top_k=20, **common)
    return outputs


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for what, value in expected.items():
        assert torch.equal(found[what], value), what


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_bit_for_bit_the_saved_one(
    saved: Mapping[str, Saved], loaded: Mapping[str, Any], family: str
) -> None:
    one = saved[family]
    assert_same(behaviour(loaded[family]), behaviour(one.model))
    assert not loaded[family].training
    assert isinstance(loaded[family], type(one.model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_has_the_saved_tensors_under_their_old_names(
    saved: Mapping[str, Saved], loaded: Mapping[str, Any], family: str
) -> None:
    one = saved[family]
    found, expected = loaded[family].state_dict(), one.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(one.dense) <= found.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_and_the_cache_are_smaller(
    saved: Mapping[str, Saved], loaded: Mapping[str, Any], family: str
) -> None:
    one = saved[family]
    for linear, module in loaded[family].named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features), linear
    stored = sum(value.numel() for name, value in load_file(one.directory / "model.safetensors").items())
    names = load_file(one.directory / "model.safetensors").keys() & one.dense.keys()
    assert stored < 0.9 * sum(one.dense[name].numel() for name in names)
    ids, _ = tokens()
    with torch.no_grad():
        cache = cache_of(loaded[family](ids, use_cache=True))
    dense_head = configuration(family).hidden_size // 4
    assert all(layer.keys.shape[-1] < dense_head and layer.values.shape[-1] < dense_head for layer in cache.layers)


def test_all_files_may_be_read_by_the_same_people(saved: Mapping[str, Saved]) -> None:
    files = list(saved[FAMILIES[0]].directory.iterdir())
    assert any(file.suffix == ".safetensors" for file in files)
    assert len({file.stat().st_mode for file in files}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_stay_tied(saved: Mapping[str, Saved], loaded: Mapping[str, Any], family: str) -> None:
    one = saved[family]
    model = loaded[family]
    tied = one.model.get_input_embeddings().weight is one.model.get_output_embeddings().weight
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_holds_just_these_files(saved: Mapping[str, Saved], family: str) -> None:
    directory = saved[family].directory
    assert {file.name for file in directory.iterdir()} == FILES
    assert is_compressed(directory)
    assert json.loads((directory / "report.json").read_text()) == {"sites": len(saved[family].solutions)}
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == [type(saved[family].model).__name__]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_every_feature_in_shuffled_order_changes_nothing_after_loading(tmp_path: Path, family: str) -> None:
    dense: Any = random_model(configuration(family), seed=4, max_layers=2)
    before = behaviour(dense)
    loaded = load(compressed(dense, full_rank).save(tmp_path / "out"))
    after = behaviour(loaded)
    # float32: sums of at most 64 terms in another order.
    assert (after["logits"] - before["logits"]).abs().max() < 1e-5 * before["logits"].abs().max()
    assert torch.equal(after["greedy"], before["greedy"])


def test_bfloat16_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    # Made by the library in bfloat16: there it keeps the rotary frequencies in float32, a later cast would not.
    torch.manual_seed(5)
    one = compressed(model_of(configuration("llama"), torch.bfloat16))
    loaded: Any = load(one.save(tmp_path / "out"))
    assert loaded.dtype == torch.bfloat16
    assert_same(behaviour(loaded), behaviour(one.model))


def test_the_dtype_can_be_chosen(saved: Mapping[str, Saved]) -> None:
    for family in ("llama", "gpt2"):
        loaded: Any = load(saved[family].directory, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        expected = saved[family].model.state_dict()
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, expected[name].to(value.dtype)), name
            assert value.is_floating_point() == expected[name].is_floating_point(), name


def test_saving_leaves_the_model_as_it_is(small_llama: Compressed, tmp_path: Path) -> None:
    model = small_llama.model
    config, settings = model.config, model.config.to_dict()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    small_llama.save(tmp_path / "out")
    assert model.config is config
    assert config.to_dict() == settings
    assert not hasattr(config, "auto_map")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_loaded_model_saves_itself_as_a_compressed_model(saved: Mapping[str, Saved], tmp_path: Path) -> None:
    loaded: Any = load(saved["phi"].directory)
    with torch.no_grad():
        loaded.model.layers[0].mlp.fc1.weight.mul_(1.5)
    loaded.save_pretrained(tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == FILES - {"report.json"}
    for name in ("modeling_compressed.py", "config.json", "plan.json"):
        assert (tmp_path / "again" / name).read_text() == (saved["phi"].directory / name).read_text()
    assert_same(behaviour(load(tmp_path / "again")), behaviour(loaded))


def test_a_loaded_model_can_be_trained(saved: Mapping[str, Saved]) -> None:
    loaded: Any = load(saved["llama"].directory)
    ids, _ = tokens()
    loaded(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_pattern_of_the_users_own_is_known_when_loading(tmp_path: Path) -> None:
    model = random_model(configuration("opt"), seed=6, max_layers=2)
    mlp = next(one for one in read_patterns() if one.name == "mlp")
    one = compressed(model, patterns=[mlp.model_copy(update={"name": "feed-forward-of-mine"})])
    assert [site.rpartition(":")[2] for site in one.solutions] == ["feed-forward-of-mine"] * 2
    assert_same(behaviour(load(one.save(tmp_path / "out"))), behaviour(model))
