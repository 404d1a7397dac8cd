"""What a rewritten forward method says no to: constants that it was not traced with, which it would ignore."""

import inspect
from collections.abc import Collection, Iterator

from modegpt_graph.codegen.expressions import attribute, literal
from modegpt_graph.trace.calls import SizeSlot, Slot
from modegpt_graph.trace.export import Trace


def guards(trace: Trace, known: Collection[str] = ()) -> Iterator[str]:
    """Statements that raise ValueError where an argument is another constant than in the traced call.

    known: names of arguments that are told apart before. A method of the library takes arguments that it hands on or
    that change nothing for its sites, so none are checked there.
    """
    call = trace.call
    if not call.only_as_seen:
        return
    for path in trace.unset:
        yield from _refuse(f"{attribute(path)} is not None", f"this module was compressed without {path}")
    named = {value.index: name for name, value in call.arguments.items() if isinstance(value, Slot)}
    for name, parameter in inspect.signature(trace.module.forward).parameters.items():
        value = call.arguments.get(name, parameter.default)
        if name == "is_causal" and type(trace.module).__module__.startswith("torch.nn."):
            continue  # torch's own layers take it for a hint of what the mask says
        if name in known or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if isinstance(value, SizeSlot) and value.index in named:
            said = f"{named[value.index]}.size({value.axis})"
            yield from _refuse(f"{name} != {said}", f"{name} must be {said}")
        elif value is None:
            yield from _refuse(f"{name} is not None", f"this module was compressed without {name}")
        elif isinstance(value, (bool, int, float, str)):
            yield from _refuse(f"{name} != {literal(value)}", f"this module was compressed for {name} = {value}")


def _refuse(condition: str, reason: str) -> Iterator[str]:
    yield f"if {condition}:"
    yield f"    raise ValueError({reason!r})"
