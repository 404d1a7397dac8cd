"""The decoder layers' matrices: what every ratio is of, and the modules that do nothing but multiply by one."""

from modegpt_graph.match.decoder import decoder_matrices
from modegpt_graph.match.unmatched import is_multiplied
from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.graph import normalise


def matrix_sizes(trace: Trace) -> dict[str, int]:
    """Decoder-layer matrix → its parameters, in model order; their sum is `decoder_linear_parameters`."""
    graph = normalise(trace)
    names = [name for name in decoder_matrices(trace) if is_multiplied(graph, name)]
    return {name: trace.module.get_parameter(name).numel() for name in names}
