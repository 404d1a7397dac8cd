"""One form for every way to multiply by a weight matrix: `linear`, `addmm`, and matrix products with a parameter."""

from dataclasses import dataclass

from torch import fx

from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.operations import Effect, effect, operation


@dataclass(frozen=True)
class Linear:
    """x W (+ b), found in a graph.

    node: where the product is.   source: what is multiplied.   weight, bias: names in the traced module.
    transposed: the parameter is stored (in, out) instead of (out, in).
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    transposed: bool

    def shape(self, parameter_shape: tuple[int, ...]) -> tuple[int, int]:
        """(output features, input features) of the parameter."""
        rows, columns = parameter_shape
        return (columns, rows) if self.transposed else (rows, columns)


_TURNS = {"t", "transpose", "permute", "T", "mT", "numpy_T", "swapaxes"}


def _parameter(node: object, state: dict[str, str]) -> tuple[str, bool] | None:
    """(name, whether it is turned) of a matrix parameter read directly or through one transposition."""
    turned = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        if operation(node) in _TURNS:
            turned = not turned
        elif effect(node) is not Effect.SAME:
            return None
        node = node.args[0]
    if isinstance(node, fx.Node) and node.name in state and node.meta["val"].ndim == 2:
        return state[node.name], turned
    return None


def find_linear(node: fx.Node, trace: Trace, parameters: frozenset[str]) -> Linear | None:
    """`node` as a product with a matrix of `parameters`, or None."""
    if node.op != "call_function" or effect(node) not in (Effect.LINEAR, Effect.PRODUCT_SUM):
        return None
    state = {placeholder: name for placeholder, name in trace.state.items() if name in parameters}
    name, args = operation(node), list(node.args)
    bias = None
    if name == "linear":
        source, matrix, bias = args[0], args[1], args[2] if len(args) > 2 else None
        stored_out_in = True
    elif name == "addmm":
        bias, source, matrix = args[:3]
        stored_out_in = False
    elif name in ("matmul", "mm"):
        source, matrix = args[:2]
        stored_out_in = False
    else:
        return None
    found = _parameter(matrix, state)
    if found is None or not isinstance(source, fx.Node):
        return None
    weight, turned = found
    bias_name = state_name(bias, trace)
    if bias is not None and bias_name is None:
        return None
    return Linear(node, source, weight, bias_name, transposed=stored_out_in == turned)


def state_name(node: object, trace: Trace) -> str | None:
    """Name of the parameter or buffer that `node` is."""
    return trace.state.get(node.name) if isinstance(node, fx.Node) else None
