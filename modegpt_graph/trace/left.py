"""What a module leaves in its attributes when it is called: another tensor in a buffer's place, or one that it made.

A graph shows what is written into a buffer, and not that a module has another buffer than before. So the new one is
copied into the old one, which is the same to every later call. A tensor that was not there before the call may be a
table that is made once; one that is computed from what the module was given is seen by later calls alone, and no graph
of one call says what they do with it.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType

import torch
from torch import Tensor, fx, nn

from modegpt_graph.trace.fake import held_tensors
from modegpt_graph.trace.operations import Effect, arguments, data_operands, effect


@contextmanager
def kept_in_place(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """After this context a tensor that took another's place is in that other; what is new beside is in the mapping."""
    left: dict[str, Tensor] = {}
    before = held_tensors(module)
    yield left
    for path, (store, name, tensor) in held_tensors(module).items():
        _, _, old = before.get(path, (None, None, None))
        if old is tensor:
            continue
        if old is not None and store.get(name) is tensor and _alike(old, tensor):
            store[name] = old.copy_(tensor)
        else:
            left[path] = tensor


def unset(module: nn.Module) -> tuple[str, ...]:
    """Paths of what is None in a module's parts, and asked for by a method: with something there, that is another call.

    A cache that is set up after the model is made is such a thing.
    """
    found = []
    for path, part in module.named_modules():
        kinds = [kind for kind in type(part).__mro__ if kind not in nn.Module.__mro__]
        methods = [value for kind in kinds for name, value in vars(kind).items() if name != "__init__"]
        asked = {name for one in methods if isinstance(one, FunctionType) for name in one.__code__.co_names}
        empty = [name for store in (part._modules, vars(part)) for name, value in store.items() if value is None]
        if not type(part).__module__.startswith("torch."):
            found += [".".join(filter(None, [path, name])) for name in empty if name in asked]
    return tuple(found)


def _alike(one: Tensor, other: Tensor) -> bool:
    return list(map(str, one.shape)) == list(map(str, other.shape))


def drop_self_copies(graph: fx.Graph) -> None:
    """Erase copies of a buffer into itself: it was put back in its place. The graph is changed."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.copy_.default and not node.users:
            kept, value = arguments(node)[:2]
            if kept.op == "placeholder" and _source(value) is kept:
                graph.erase_node(node)


def take_left(graph: fx.Graph, names: Sequence[str], inputs: Collection[object]) -> str | None:
    """Take what a module left out of the results of its graph; why the graph does not say all that it does, if so.

    names: of what it left, which stand last among the results.   inputs: names of placeholders that were given.
    """
    output = graph.output_node()
    (results,) = arguments(output)
    count = len(results) - len(names)
    output.args = (tuple(results[:count]),)
    for name, value in zip(names, results[count:], strict=True):
        if isinstance(value, fx.Node) and _depends(value, inputs):
            return (
                f"it keeps `{name}`, computed from what it is given, for later calls: register a buffer of the full "
                "size and write into that"
            )
    return None


def _source(value: fx.Node) -> fx.Node:
    """The value that copies in the same dtype brought here."""
    while effect(value) is Effect.SAME and value.meta["val"].dtype == arguments(value)[0].meta["val"].dtype:
        value = arguments(value)[0]
    return value


def _depends(value: fx.Node, inputs: Collection[object]) -> bool:
    """Whether numbers that are given, not only their sizes and positions, are in a value."""
    queue, seen = [value], {value}
    while queue:
        node = queue.pop()
        if node.name in inputs and node.meta["val"].is_floating_point():
            return True
        new = {one for one in data_operands(node) if effect(one) is not Effect.SIZE} - seen
        seen |= new
        queue += new
    return False
