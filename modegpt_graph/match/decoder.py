"""Which parameters are decoder-layer weight matrices, told by how the modules are nested."""

from collections.abc import Iterable
from itertools import takewhile

from torch import nn

from modegpt_graph.trace.export import Trace


def layer_of(model: nn.Module, parameter: str) -> tuple[str, int] | None:
    """(list of layers, index in it) of the outermost repeated container that holds a parameter, None outside of one."""
    parts = parameter.split(".")
    module = model
    for depth, part in enumerate(parts[:-1]):
        if isinstance(module, nn.ModuleList):
            return ".".join(parts[:depth]), int(part)
        module = module.get_submodule(part)
    return None


def decoder_matrices(trace: Trace) -> dict[str, int]:
    """Weight matrices (two axes or more) of the decoder layers that the trace uses: name → layer, in model order.

    Layers are numbered through where a model has several lists of them. A model without a list of layers is one layer;
    its embedding and its output projection, the matrices that touch token ids and logits, are left out.
    """
    used = set(trace.state.values())
    model = trace.module
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2 and name in used}
    places = {name: layer_of(model, name) for name in matrices}
    if not any(places.values()):
        inner = [name for name in matrices if not _touches_vocabulary(trace, name)]
        return dict.fromkeys(inner, 0)
    numbers: dict[tuple[str, int], int] = {}
    return {name: numbers.setdefault(place, len(numbers)) for name, place in places.items() if place is not None}


def decoder_layers(trace: Trace) -> tuple[str, ...]:
    """Paths of the decoder layers, by layer number; the model itself where it has no list of layers."""
    paths: dict[int, str] = {}
    for name, layer in decoder_matrices(trace).items():
        place = layer_of(trace.module, name)
        paths.setdefault(layer, "" if place is None else ".".join(filter(None, (place[0], str(place[1])))))
    return tuple(paths[layer] for layer in sorted(paths))


def _touches_vocabulary(trace: Trace, name: str) -> bool:
    """Whether a parameter is an embedding table, or yields the logits."""
    placeholder = next(key for key, value in trace.state.items() if value == name)
    node = next(node for node in trace.graph.nodes if node.name == placeholder)
    outputs = set(trace.graph.output_node().all_input_nodes)
    return any(str(user.target).startswith("aten.embedding") or user in outputs for user in node.users)


def common_path(parameters: Iterable[str]) -> str:
    """Path of the smallest module that holds the modules of all these parameters, or holds them itself."""
    names = [parameter.split(".") for parameter in dict.fromkeys(parameters)]
    together = len(names) > 1 and len({tuple(name[:-1]) for name in names}) == 1
    owners = [name[:-1] if together else name[:-2] for name in names]
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False)))
