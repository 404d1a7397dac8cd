"""`FILE.py:factory`: a plain module from the user's own code."""

import difflib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modegpt_graph.errors import InputError


def call_factory(file: Path, function: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Run `file` and call `function` in it, which takes nothing and returns (module, example_inputs).

    The first of the example inputs is the (B, S) tensor of token ids. Modules beside the file can be imported by it.
    Raises InputError where the file, the function or what it returns is not as it must be.
    """
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    made = _attribute(_run(file), file, function)
    try:
        returned = made()
    except Exception as error:  # the user's own code may fail in any way
        raise InputError(f"{file}:{function} raised {type(error).__name__}: {error}") from error
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], nn.Module)):
        raise InputError(f"{file}:{function} must return (module, example_inputs), not {type(returned).__name__}")
    module, example_inputs = returned
    if not (isinstance(example_inputs, tuple) and example_inputs and isinstance(example_inputs[0], Tensor)):
        raise InputError(f"{file}:{function}: example_inputs must be a tuple that starts with the (B, S) token ids")
    return module, example_inputs


def _run(file: Path) -> Any:
    name = f"modegpt_graph_factory_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and deep copies look their module up by name.
    sys.modules[name] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may fail in any way
        raise InputError(f"{file} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module


def _attribute(module: Any, file: Path, function: str) -> Any:
    found = getattr(module, function, None)
    if callable(found):
        return found
    names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    alike = difflib.get_close_matches(function, names, n=1)
    advice = f"did you mean {alike[0]}?" if alike else "it must be defined at the top of the file"
    raise InputError(f"{file} has no function {function}; {advice}")
