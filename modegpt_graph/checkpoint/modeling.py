"""`modeling_compressed.py`: a compressed model as Python that needs torch and transformers, not this package."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

from torch import nn

from modegpt_graph.checkpoint.plan import ModulePlan
from modegpt_graph.checkpoint.wrap import wrap
from modegpt_graph.codegen.emit import Forward
from modegpt_graph.errors import ModegptError
from modegpt_graph.rewrite.apply import RewrittenModule

MODELING_FILE = "modeling_compressed.py"
AUTO_CLASS = "AutoModelForCausalLM"
CONFIG_KEY = "modegpt_graph"
REMOTE = "transformers_modules."  # where the library keeps modules that it read from a folder or the hub

_HEADER = '''"""{architecture} with smaller matrices. Written by {written_by}.

The original is {source}.

Every matrix kept its old name; only sizes differ, layer by layer, and are read from `config.modegpt_graph`. Where the
original forward method does not fit the smaller matrices, a subclass below has one that was generated from the traced
graph. Load it with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.
"""
'''

_CLASS = '''
class {name}({base}):
    """{base} whose forward method fits the sizes that its own layer has."""

{forward}
'''

_RESIZE = '''
def _resize(model: nn.Module, modules: dict[str, dict]) -> None:
    """Give the modules listed in the configuration their sizes; what is in them comes from the weights file afterwards.

    Listed by path: the class whose forward method fits (None: the module keeps its own), whole numbers and buffers
    that the method reads, linear layers as (outputs, inputs, bias), and shapes of other parameters.
    """
    for path, listed in modules.items():
        module = model.get_submodule(path)
        if listed["class_name"] is not None:
            module.__class__ = _CLASSES[listed["class_name"]]
        for name, value in listed["attributes"].items():
            setattr(module, name, value)
        for name, (shape, dtype) in listed["buffers"].items():
            module.register_buffer(name, torch.zeros(shape, dtype=getattr(torch, dtype)))
        for name, (outputs, inputs, bias) in listed["linears"].items():
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, nn.Linear(inputs, outputs, bias=bias))
        for name, shape in listed["parameters"].items():
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, nn.Parameter(torch.zeros(shape)))
'''

_MODEL = '''
class {name}({architecture}):
    """{architecture} in the sizes that `config.modegpt_graph` lists."""

    def __init__(self, config, *inputs, **keywords):
        super().__init__(config, *inputs, **keywords)
        _resize(self, config.modegpt_graph){eager}


_CLASSES = {{{classes}}}
'''


_EAGER = """
        # Attention is written out above: it reads the mask that the model makes for eager code.
        config._attn_implementation = "eager"
"""


def compressed_name(architecture: str) -> str:
    """Name of the generated class for the whole model."""
    return f"Compressed{architecture}"


def config_entry(modules: Sequence[ModulePlan]) -> dict[str, dict]:
    """What the generated file reads from the configuration: module path → class, attributes, buffers, sizes."""
    return {
        module.path: {
            "class_name": module.class_name,
            "attributes": dict(module.attributes),
            "buffers": {name: [list(buffer.shape), buffer.dtype] for name, buffer in module.buffers.items()},
            "linears": {
                name: [linear.out_features, linear.in_features, linear.bias] for name, linear in module.linears.items()
            },
            "parameters": {name: list(shape) for name, shape in module.parameters.items()},
        }
        for module in modules
    }


def modeling_source(model: nn.Module, rewritten: Sequence[RewrittenModule], *, source: str, written_by: str) -> str:
    """The text of `modeling_compressed.py`, lines of at most 120 columns.

    model: rewritten already.   source: what the user called the original.   written_by: this package and its version.
    Raises ModegptError where a class that the file builds on cannot be imported, or a module keeps a cache of its own.
    """
    kept = next((name for one in rewritten for name in one.kept), None)
    if kept is not None:
        raise ModegptError(f"`{kept}` is smaller in the compressed model, and the modelling file cannot make it so")
    architecture = type(model).__name__
    imports = _Imports()
    name = compressed_name(architecture)
    imports.add(architecture, type(model).__module__, type(model).__qualname__)
    classes: dict[str, str] = {}
    for one in rewritten:
        if one.class_name is None or one.forward is None or one.class_name in classes:
            continue
        base = type(model.get_submodule(one.path)).__mro__[1]
        bound = imports.add(base.__name__, base.__module__, base.__qualname__)
        classes[one.class_name] = _class_source(one.class_name, bound, one.forward, imports)
    listed = ", ".join(f'"{one}": {one}' for one in classes)
    eager = _EAGER.rstrip() if any(one.attends for one in rewritten) else ""
    header = _HEADER.format(architecture=architecture, written_by=written_by, source=_plain(source))
    top = _MODEL.format(name=name, architecture=architecture, classes=listed, eager=eager)
    parts = [f"{header}\n{imports.text()}", *classes.values(), _RESIZE.strip("\n"), top.strip("\n")]
    return wrap("\n\n\n".join(parts)) + "\n"


def _plain(text: str) -> str:
    """A name of the user's, fit to stand in a docstring."""
    return re.sub(r"[^\w ./:@+-]", "_", text)


def _class_source(name: str, base: str, forward: Forward, imports: "_Imports") -> str:
    source = forward.source
    for local, (module, qualified) in forward.imports.items():
        bound = imports.add(local, module, qualified)
        if bound != local:
            source = re.sub(rf"(?<![\w.]){re.escape(local)}\b", bound, source)
    return _CLASS.format(name=name, base=base, forward=indent(source.rstrip(), "    ")).strip("\n")


@dataclass
class _Imports:
    """Names that the file needs: name bound there → (module, qualified name)."""

    names: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, name: str, module: str, qualified: str) -> str:
        """Bind `name`, or another name where that one is taken. Returns the name that was bound."""
        if not _importable(module, qualified):
            raise ModegptError(
                f"{module}.{qualified} cannot be imported, so no modelling file can build on it; save a model whose "
                "classes are in an installed package, and that is not compressed already"
            )
        bound, number = name, 2
        while self.names.get(bound, (module, qualified)) != (module, qualified):
            bound, number = f"{name}_{number}", number + 1
        self.names[bound] = (module, qualified)
        return bound

    def text(self) -> str:
        by_module: dict[str, list[str]] = {}
        assigned = []
        for bound, (module, qualified) in sorted(self.names.items(), key=lambda item: (item[1], item[0])):
            first, _, rest = qualified.partition(".")
            if rest:
                by_module.setdefault(module, []).append(first)
                assigned.append(f"{bound} = {qualified}")
            else:
                by_module.setdefault(module, []).append(first if first == bound else f"{first} as {bound}")
        lines = ["import torch", "from torch import nn"]
        lines += [_import_line(module, names) for module, names in sorted(by_module.items())]
        return "\n".join([*lines, *([""] if assigned else []), *assigned])


def _importable(module: str, qualified: str) -> bool:
    value: Any = sys.modules.get(module)
    for part in qualified.split("."):
        value = getattr(value, part, None)
    return module != "__main__" and value is not None


def remote_files(model: nn.Module) -> tuple[Path, ...]:
    """The files of an original that is itself code from a folder or the hub: they must stand beside the new file."""
    from transformers.dynamic_module_utils import get_relative_import_files

    files: dict[str, None] = {}
    for module in dict.fromkeys(kind.__module__ for part in model.modules() for kind in type(part).__mro__):
        if module.startswith(REMOTE) and (file := getattr(sys.modules.get(module), "__file__", None)):
            files |= dict.fromkeys([file, *get_relative_import_files(file)])
    return tuple(map(Path, files))


def _import_line(module: str, names: Sequence[str]) -> str:
    unique = sorted(dict.fromkeys(names))
    module = f".{module.rpartition('.')[2]}" if module.startswith(REMOTE) else module
    line = f"from {module} import {', '.join(unique)}"
    return line if len(line) <= 120 else f"from {module} import (\n" + "".join(f"    {n},\n" for n in unique) + ")"


def auto_map(architecture: str) -> dict[str, str]:
    """The configuration's entry that leads the library to the generated class."""
    return {AUTO_CLASS: f"{MODELING_FILE.removesuffix('.py')}.{compressed_name(architecture)}"}
