import contextlib
import json
import socket
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import nn

from modegpt_graph.data import architectures_directory, patterns_directory
from modegpt_graph.errors import InputError
from modegpt_graph.models import HubUnreachable, architecture_names, resolve
from modegpt_graph.models.cache import built_in_place
from modegpt_graph.models.depth import shallow

PARAMETERS = {
    "falcon-7b": 6_921_720_704,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gpt-neox-20b": 20_554_567_680,
    "gpt2": 124_439_808,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "phi-2": 2_779_683_840,
    "qwen3-0.6b": 596_049_920,
}
FACTORY = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))

def build():
    return Plain(), (torch.zeros(1, 3, dtype=torch.int64),)

def build_without_inputs():
    return Plain()

def broken():
    raise RuntimeError("no weights today")
"""


@pytest.fixture
def no_hub(monkeypatch):
    """The hub at an address where nothing listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def factory_file(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text(FACTORY)
    return file


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(module):
    return all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


class TestArchitectures:
    @pytest.mark.parametrize("name", PARAMETERS)
    def test_has_the_public_models_parameter_count_and_no_data(self, name):
        source = resolve(name)
        skeleton = source.skeleton()
        assert parameters(skeleton) == PARAMETERS[name]
        assert on_meta(skeleton)
        assert not skeleton.training
        assert (source.kind, source.has_weights, source.tokenizer()) == ("architecture", False, None)
        assert type(skeleton).__name__ == source.architecture == source.config.architectures[0]

    def test_every_file_is_counted_here_and_says_where_it_is_from(self):
        assert set(architecture_names()) == set(PARAMETERS)
        for file in architectures_directory().glob("*.json"):
            record = json.loads(file.read_text())
            assert set(record) == {"source", "config"}
            assert record["source"].startswith("https://")

    def test_patterns_lie_beside_architectures(self):
        assert patterns_directory().is_dir()

    def test_load_says_that_there_are_no_weights(self):
        with pytest.raises(InputError, match="llama-2-7b is a configuration without weights"):
            resolve("llama-2-7b").load()


class TestRandom:
    def test_is_two_layers_deep_and_as_wide_as_the_configuration(self):
        model = resolve("opt-125m").random(seed=0)
        assert model.config.num_hidden_layers == 2
        assert model.config.hidden_size == 768
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_follows_the_seed_and_leaves_the_global_generator_alone(self, tiny):
        source = resolve(tiny())
        state = torch.get_rng_state()
        first, again, other = (source.random(seed=seed).state_dict() for seed in (1, 1, 2))
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)

    def test_biases_and_norm_weights_are_no_constants(self):
        model = resolve("opt-125m").random(seed=0)
        vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        assert vectors
        assert all(vector.std() > 0.05 for vector in vectors)

    def test_per_layer_lists_are_cut_and_each_kind_of_layer_kept(self):
        from transformers import Gemma3TextConfig

        config = Gemma3TextConfig(num_hidden_layers=12)
        assert config.layer_types.index("full_attention") == 5
        cut = shallow(config, 2)
        assert cut.num_hidden_layers == 2
        assert cut.layer_types == ["sliding_attention", "full_attention"]
        assert len(config.layer_types) == 12

    def test_nested_text_configuration_is_cut(self):
        from transformers import Gemma3Config

        cut = shallow(Gemma3Config(), 1)
        assert cut.get_text_config().num_hidden_layers == 1
        assert len(cut.get_text_config().layer_types) == 1

    def test_lists_of_token_ids_are_not_cut(self):
        from transformers import LlamaConfig

        assert shallow(LlamaConfig(num_hidden_layers=3, eos_token_id=[1, 2, 3]), 2).eos_token_id == [1, 2, 3]

    def test_a_shallow_model_keeps_its_depth(self, tiny):
        assert resolve(tiny(num_hidden_layers=1)).random(seed=0).config.num_hidden_layers == 1


class TestModuleInMemory:
    def test_skeleton_copies_no_data_and_leaves_the_module_alone(self, tiny):
        model = tiny()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        skeleton = resolve(model).skeleton()
        assert on_meta(skeleton)
        assert skeleton.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_parameters_stay_tied(self, tiny, tied):
        skeleton = resolve(tiny(tie_word_embeddings=tied)).skeleton()
        assert (skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight) is tied

    def test_tensors_outside_the_registries_go_to_meta_too(self):
        module = nn.Linear(2, 2)
        module.table = [torch.ones(3), {"inner": torch.ones(4)}]
        table = resolve(module).skeleton().table
        assert table[0].is_meta
        assert table[1]["inner"].is_meta

    def test_strides_survive(self):
        module = nn.Linear(3, 5, bias=False)
        module.weight = nn.Parameter(torch.randn(3, 5).t())
        assert resolve(module).skeleton().weight.stride() == (1, 5)

    def test_is_returned_by_load_as_it_is(self, tiny):
        model = tiny().train()
        assert resolve(model).load() is model
        assert model.training

    def test_on_the_meta_device_has_no_weights_to_load(self):
        source = resolve(nn.Linear(2, 2, device="meta"))
        assert not source.has_weights
        with pytest.raises(InputError, match="meta device"):
            source.load()

    def test_plain_module_has_example_inputs_and_no_configuration(self):
        inputs = (torch.zeros(1, 3, dtype=torch.int64),)
        source = resolve(nn.Embedding(5, 2), example_inputs=inputs)
        assert source.example_inputs is inputs
        assert source.config is None
        assert source.architecture == "Embedding"
        with pytest.raises(InputError, match="no configuration"):
            source.random(seed=0)


class TestFolder:
    def test_loads_the_weights_in_the_dtype_asked_for(self, tiny, tiny_folder):
        model = resolve(tiny_folder).load(torch.float64)
        expected = tiny().state_dict()
        assert all(torch.equal(tensor, expected[name].double()) for name, tensor in model.state_dict().items())
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_needs_no_weights_for_a_skeleton(self, tiny_folder):
        (tiny_folder / "model.safetensors").unlink()
        source = resolve(str(tiny_folder))
        assert on_meta(source.skeleton())
        with pytest.raises(InputError, match="without weights"):
            source.load()

    def test_pickled_weights_are_not_weights(self, tiny, tiny_folder):
        (tiny_folder / "model.safetensors").unlink()
        torch.save(tiny().state_dict(), tiny_folder / "pytorch_model.bin")
        assert not resolve(tiny_folder).has_weights

    def test_without_tokenizer_has_none(self, tiny_folder):
        assert resolve(tiny_folder).tokenizer() is None

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("{", "cannot be read"),
            ('{"hidden_size": 4}', "cannot be read"),
            ('{"model_type": "t5"}', "t5 model is no causal language model"),
        ],
    )
    def test_bad_configuration_is_one_line(self, tmp_path, text, expected):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=expected) as caught:
            resolve(tmp_path)
        assert "\n" not in str(caught.value)

    def test_without_configuration_says_what_to_give(self, tmp_path):
        with pytest.raises(InputError, match=r"has no config\.json; give the folder of a transformers model"):
            resolve(tmp_path)
        (tmp_path / "model.gguf").touch()
        with pytest.raises(InputError, match=r"has no config\.json; name the file .*model\.gguf"):
            resolve(tmp_path)

    def test_code_in_the_folder_is_not_run(self, tmp_path):
        config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
        with pytest.raises(InputError, match="cannot be read"):
            resolve(tmp_path)
        assert not (tmp_path / "ran").exists()


class TestFactory:
    def test_gives_module_and_example_inputs(self, factory_file):
        source = resolve(f"{factory_file}:build")
        module = source.load()
        assert source.kind == "factory"
        assert module(*source.example_inputs).shape == (1, 3, 11)
        assert not module.training
        assert on_meta(source.skeleton())
        assert not on_meta(module)

    @pytest.mark.parametrize(
        ("function", "expected"),
        [
            ("biuld", "has no function biuld; did you mean build?"),
            ("build_without_inputs", r"must return \(module, example_inputs\), not Plain"),
            ("broken", "raised RuntimeError: no weights today"),
        ],
    )
    def test_what_is_wrong_is_said(self, factory_file, function, expected):
        with pytest.raises(InputError, match=expected):
            resolve(f"{factory_file}:{function}")

    def test_the_function_must_be_named(self, factory_file):
        with pytest.raises(InputError, match=r"plain\.py:factory"):
            resolve(str(factory_file))

    def test_missing_file(self):
        with pytest.raises(InputError, match=r"there is no file missing\.py"):
            resolve("missing.py:build")


class TestUnknownNames:
    def test_near_a_known_name(self, no_hub):
        with pytest.raises(HubUnreachable, match=r"out of reach; did you mean llama-2-7b\?"):
            resolve("llama-2-7")

    def test_a_hub_that_hangs_up_is_asked_once(self, monkeypatch):
        callers = []
        with socket.create_server(("127.0.0.1", 0)) as server:

            def hang_up():
                with contextlib.suppress(OSError):
                    while True:
                        caller, _ = server.accept()
                        callers.append(caller)
                        caller.close()

            Thread(target=hang_up, daemon=True).start()
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
            with pytest.raises(HubUnreachable):
                resolve("nobody/nothing-at-all")
        # The library's own answer to this is six requests over 23 seconds.
        assert len(callers) == 1

    def test_cached_hub_model_works_without_the_hub(self, no_hub, monkeypatch, tmp_path, tiny_folder):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        repository = tmp_path / "hub" / "models--some--body"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        tiny_folder.rename(repository / "snapshots" / ("0" * 40))
        source = resolve("some/body")
        assert source.kind == "hub"
        assert parameters(source.load()) == parameters(source.skeleton()) > 0

    @pytest.mark.parametrize("name", ["./missing", "/missing", "a/b/c", Path("missing")])
    def test_paths_are_not_asked_of_the_hub(self, name):
        with pytest.raises(InputError, match="there is no folder"):
            resolve(name)

    def test_missing_gguf(self):
        with pytest.raises(InputError, match=r"there is no file missing\.gguf"):
            resolve("missing.gguf")

    def test_broken_gguf(self, tmp_path):
        (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
        with pytest.raises(InputError, match="cannot be read as GGUF"):
            resolve(tmp_path / "broken.gguf")

    def test_empty(self):
        with pytest.raises(InputError, match="empty"):
            resolve("")


class TestDemo:
    def test_is_a_whole_model_without_quantisation(self, demo_source, demo):
        assert demo_source.kind == "demo"
        assert parameters(demo) == 134_515_008
        assert {parameter.dtype for parameter in demo.parameters()} == {torch.float32}
        assert not hasattr(demo.config, "quantization_config")

    def test_speaks(self, demo, demo_tokenizer):
        prompt = demo_tokenizer("The capital of France is", return_tensors="pt")
        written = demo.generate(**prompt, max_new_tokens=3, do_sample=False)
        assert "Paris" in demo_tokenizer.decode(written[0])

    def test_module_in_memory_finds_its_tokenizer(self, demo, demo_tokenizer):
        found = resolve(demo).tokenizer()
        assert found("a b c")["input_ids"] == demo_tokenizer("a b c")["input_ids"]


class TestBuiltInPlace:
    def test_failure_leaves_nothing(self, tmp_path):
        def fail_half_way():
            with built_in_place(tmp_path / "cache" / "made") as working:
                (working / "half").touch()
                raise ValueError("stop")

        with pytest.raises(ValueError, match="stop"):
            fail_half_way()
        assert list((tmp_path / "cache").iterdir()) == []

    def test_whoever_was_first_stays(self, tmp_path):
        target = tmp_path / "made"
        with built_in_place(target) as working:
            (working / "mine").touch()
            target.mkdir()
            (target / "theirs").touch()
        assert [file.name for file in target.iterdir()] == ["theirs"]
        assert list(tmp_path.iterdir()) == [target]
