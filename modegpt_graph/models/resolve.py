"""MODEL, as a user writes it, to the source it names."""

import difflib
import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from modegpt_graph.data import architectures_directory
from modegpt_graph.errors import InputError
from modegpt_graph.models.build import class_of, quiet
from modegpt_graph.models.demo import demo_directory
from modegpt_graph.models.factory import call_factory
from modegpt_graph.models.gguf import gguf_config
from modegpt_graph.models.hub import HubUnreachable, hub_is_reachable
from modegpt_graph.models.source import ModelSource, one_line

FACTORY = re.compile(r"(?P<file>.+\.py):(?P<function>[^\W\d]\w*)")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DEMO = "demo"


def resolve(
    model: str | Path | nn.Module,
    *,
    trust_remote_code: bool = False,
    example_inputs: tuple[Any, ...] | None = None,
) -> ModelSource:
    """Find the model that MODEL names; nothing of its weights is read.

    `model` is, in this order: a module in memory; `demo`; a name in `architectures/`; `FILE.py:factory`; a `.gguf`
    file; a folder; a hub id. A folder called like one of the names is written `./name`, or given as a Path.
    Raises InputError (HubUnreachable, within 5 seconds, where only the hub could tell) with what was wrong.
    """
    if isinstance(model, nn.Module):
        return _from_module(model, example_inputs)
    text = str(model)
    if not text:
        raise InputError("the model's name is empty; give a hub id, a folder, a .gguf file, FILE.py:factory or 'demo'")
    if isinstance(model, str):
        if text == DEMO:
            return _from_folder(demo_directory(), name=DEMO, kind="demo", trust_remote_code=False)
        if text in architecture_names():
            return _from_architecture(text)
    if called := FACTORY.fullmatch(text):
        return _from_factory(text, Path(called["file"]), called["function"], example_inputs)
    path = Path(text).expanduser()
    if path.suffix == ".py":
        raise InputError(f"{text}: name the function that builds the model too, as {path.name}:factory")
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.is_dir():
        return _from_folder(path, name=text, kind="folder", trust_remote_code=trust_remote_code)
    if path.is_file():
        raise InputError(f"{text} is a file that holds no model; give a folder, a .gguf file or FILE.py:factory")
    if isinstance(model, Path) or text[0] in "./~" or not HUB_ID.fullmatch(text):
        raise InputError(f"there is no folder {text}; give a folder that holds config.json; {_names_hint(text)}")
    return _from_hub(text, trust_remote_code)


def architecture_names() -> tuple[str, ...]:
    """The names in `architectures/`, sorted."""
    return tuple(sorted(file.stem for file in architectures_directory().glob("*.json")))


def _from_module(module: nn.Module, example_inputs: tuple[Any, ...] | None) -> ModelSource:
    from transformers import PretrainedConfig

    config = getattr(module, "config", None)
    config = config if isinstance(config, PretrainedConfig) else None
    origin = config.name_or_path if config is not None else ""
    return ModelSource(
        name=origin or type(module).__name__,
        architecture=type(module).__name__,
        kind="module",
        config=config,
        example_inputs=example_inputs,
        has_weights=not any(parameter.is_meta for parameter in module.parameters()),
        location=origin or None,
        module=module,
        # A module in memory must not send anybody to the network for its tokenizer.
        local_files_only=True,
    )


def _from_factory(name: str, file: Path, function: str, example_inputs: tuple[Any, ...] | None) -> ModelSource:
    module, own_inputs = call_factory(file, function)
    return ModelSource(
        name=name,
        architecture=type(module).__name__,
        kind="factory",
        config=None,
        example_inputs=example_inputs or own_inputs,
        has_weights=True,
        module=module,
    )


def _from_architecture(name: str) -> ModelSource:
    from transformers import AutoConfig

    record = json.loads((architectures_directory() / f"{name}.json").read_text(encoding="utf-8"))
    config = AutoConfig.for_model(**record["config"])
    return ModelSource(name, _class_name(config, name), "architecture", config, None, has_weights=False)


def _from_gguf(file: Path) -> ModelSource:
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    try:
        with quiet():
            config = gguf_config(file)
    except Exception as error:  # a broken header fails in as many ways as it can be broken
        raise InputError(f"{file} cannot be read as GGUF: {one_line(error)}") from error
    return ModelSource(str(file), _class_name(config, str(file)), "gguf", config, None, has_weights=True, location=file)


def _from_folder(folder: Path, *, name: str, kind: Any, trust_remote_code: bool) -> ModelSource:
    if not (folder / "config.json").is_file():
        held = sorted(file.name for file in folder.glob("*.gguf"))
        advice = f"name the file {folder / held[0]}" if held else "give the folder of a transformers model"
        raise InputError(f"{name} has no config.json; {advice}")
    config = _read_config(folder, name, trust_remote_code=trust_remote_code, local_files_only=True)
    return ModelSource(
        name=name,
        architecture=_class_name(config, name),
        kind=kind,
        config=config,
        example_inputs=None,
        has_weights=any(folder.glob("*.safetensors")),
        location=folder,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
    )


def _from_hub(name: str, trust_remote_code: bool) -> ModelSource:
    reachable = hub_is_reachable()
    try:
        config = _read_config(name, name, trust_remote_code=trust_remote_code, local_files_only=not reachable)
    except InputError as error:
        if reachable:
            raise InputError(f"{error}; {_names_hint(name)}") from error
        raise HubUnreachable(
            f"{name} is no folder and not in the local cache, and the hub is out of reach; {_names_hint(name)}"
        ) from error
    return ModelSource(
        name=name,
        architecture=_class_name(config, name),
        kind="hub",
        config=config,
        example_inputs=None,
        has_weights=True,
        location=name,
        trust_remote_code=trust_remote_code,
        local_files_only=not reachable,
    )


def _read_config(location: str | Path, name: str, *, trust_remote_code: bool, local_files_only: bool) -> Any:
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(
                location, trust_remote_code=trust_remote_code, local_files_only=local_files_only
            )
    except Exception as error:  # figures that contradict each other are told by each configuration class in its own way
        raise InputError(f"{name}: the configuration cannot be read: {one_line(error)}") from error


def _class_name(config: Any, name: str) -> str:
    """Name of the class that a causal language model of `config` has. Raises InputError where there is none."""
    if (made := class_of(config)) is not None:
        return getattr(made, "__name__", "")
    automatic = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in automatic:
        return str(automatic["AutoModelForCausalLM"]).rpartition(".")[2]
    raise InputError(f"{name}: a {config.model_type} model is no causal language model; give a decoder")


def _names_hint(text: str) -> str:
    """Names of `architectures/` like `text`, or all of them."""
    names = (DEMO, *architecture_names())
    if alike := difflib.get_close_matches(text.rpartition("/")[2].lower(), names, n=1, cutoff=0.6):
        return f"did you mean {alike[0]}?"
    return f"known names: {', '.join(names)}"
