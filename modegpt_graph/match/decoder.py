"""Which parameters are decoder-layer weight matrices, told by how the modules are nested."""

from collections.abc import Iterable
from itertools import takewhile

from torch import nn

from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.graph import ELEMENTWISE
from modegpt_graph.trace.operations import Effect, effect, operation


def layer_of(model: nn.Module, parameter: str) -> tuple[str, int] | None:
    """(list of layers, index in it) of the outermost repeated container that holds a parameter, None outside of one.

    A sequence counts where what stands in that place has modules of its own: layers have, a projection has not.
    """
    parts = parameter.split(".")
    module = model
    for depth, part in enumerate(parts[:-1]):
        inner = module.get_submodule(part)
        listed = isinstance(module, nn.Sequential) and any(True for _ in inner.children())
        if listed or isinstance(module, nn.ModuleList):
            return ".".join(parts[:depth]), int(part)
        module = inner
    return None


def decoder_matrices(trace: Trace) -> dict[str, int]:
    """Weight matrices (two axes or more) of the decoder layers that the trace uses: name → layer, in model order.

    Layers are numbered through where a model has several lists of them. A model without a list of layers, or with most
    of its matrices outside of lists (of heads, say), is one layer; its embedding and its output projection, which touch
    token ids and logits, are left out.
    """
    numbers: dict[object, int] = {}
    return {name: numbers.setdefault(place, len(numbers)) for name, place in _places(trace).items()}


def decoder_layers(trace: Trace) -> tuple[str, ...]:
    """Paths of the decoder layers, by layer number; the model itself where it has no list of layers."""
    places = dict.fromkeys(_places(trace).values())
    return tuple("" if place is None else ".".join(filter(None, (place[0], str(place[1])))) for place in places)


def _places(trace: Trace) -> dict[str, tuple[str, int] | None]:
    """Decoder-layer matrix → its layer, None where the model is one."""
    used = set(trace.state.values())
    model = trace.module
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and name in used}
    listed = {name: place for name in sizes if (place := layer_of(model, name)) is not None}
    ends = _touching_vocabulary(trace)
    inner = [name for name in sizes if name in listed or name not in ends]
    if 2 * sum(sizes[name] for name in listed) < sum(sizes[name] for name in inner):
        return dict.fromkeys((name for name in inner if name not in ends), None)
    return dict(listed)


def _touching_vocabulary(trace: Trace) -> set[str]:
    """Parameters that are embedding tables, or yield the logits."""
    near, queue = set(), list(trace.graph.output_node().all_input_nodes)
    while queue:
        node = queue.pop()
        if node not in near:
            near.add(node)
            if effect(node) in ELEMENTWISE | {Effect.SAME, Effect.MOVE}:
                queue += node.all_input_nodes
    found = set()
    for node in trace.graph.nodes:
        if node.name in trace.state:
            readers = [node, *(user for user in node.users if effect(user) in (Effect.SAME, Effect.MOVE))]
            users = {user for reader in readers for user in reader.users}
            if any(operation(user) == "embedding" or user in near for user in users):
                found.add(trace.state[node.name])
    return found


def common_path(parameters: Iterable[str]) -> str:
    """Path of the smallest module in which all these parameters are; above the one that has nothing but one of them."""
    names = [parameter.split(".") for parameter in dict.fromkeys(parameters)]
    owners = [name[:-1] if len(names) > 1 else name[:-2] for name in names]
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False)))
