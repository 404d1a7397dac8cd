"""Why a matrix belongs to no site, in a sentence that a person can act on."""

from collections.abc import Collection, Iterable, Sequence

from torch import fx

from modegpt_graph.match.matcher import Miss
from modegpt_graph.match.reasons import listed
from modegpt_graph.match.sites import Unmatched
from modegpt_graph.trace.graph import ELEMENTWISE, Graph
from modegpt_graph.trace.operations import Effect, effect, is_data, operation

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "convolution", "conv_transpose1d"})
_ON_ELEMENTS = ELEMENTWISE | {Effect.MOVE, Effect.SAME, Effect.REDUCE}
_TAKES_ONE = frozenset({"select", "unbind", "index"})
_MOST_READERS = 4


def is_multiplied(graph: Graph, parameter: str) -> bool:
    """Whether a parameter is a matrix (or several) that something is multiplied by: no table, kernel or scale."""
    if parameter in graph.linears:
        return True
    kinds = {effect(node) for node in _readers(_placeholder(graph, parameter)) if operation(node) not in _CONVOLUTIONS}
    return bool(kinds & {Effect.PRODUCT_SUM, Effect.LINEAR, Effect.UNKNOWN}) or _makes_a_matrix(graph, parameter)


def explain(graph: Graph, parameter: str, misses: Iterable[Miss], in_sites: Collection[str]) -> Unmatched:
    """The nearest pattern of a matrix in no site, and how far it got; or what stands around the matrix instead.

    in_sites: matrices that belong to sites; a near miss that needs one of them is not near.
    """
    keys = set(graph.linears.get(parameter, ()))
    if not keys:
        return Unmatched(parameter, None, _not_one_matrix(graph, parameter))

    def others(miss: Miss) -> bool:
        weights = (graph.linear(miss.linears[role]) for role in miss.beyond_first)
        return any(linear is not None and linear.weight in in_sites for linear in weights)

    near = [miss for miss in misses if keys & set(miss.linears.values())]
    best = max(near, key=lambda miss: (not others(miss), len(miss.beyond_first), miss.matched), default=None)
    reads = _names(node for key in keys for node in _readers(graph.traced(key)))
    if any(_chooses(graph.traced(key)) for key in keys):
        reason = f"its product goes to {reads} and is ranked to choose among experts or positions: it is left as it is"
        return Unmatched(parameter, None, reason)
    if best is not None and best.beyond_first and not others(best):
        return Unmatched(parameter, best.pattern, str(best))
    written = _names(node for key in keys for node in _writers(graph, key))
    surroundings = f"it multiplies what comes from {written}, and its product goes to {reads}"
    if best is None:
        return Unmatched(parameter, None, f"no pattern reaches it: {surroundings}")
    role = next(role for role, key in best.linears.items() if key in keys)
    nearest = f"; as `{role}`: {best}" if best.beyond_first or best.matched > 1 else ""
    return Unmatched(parameter, best.pattern, f"no pattern has a place for it: {surroundings}{nearest}")


def _chooses(start: fx.Node) -> bool:
    """Whether a product goes, through operations on its elements alone, to where the largest are chosen."""
    seen, queue = {start}, [start]
    while queue:
        for user in queue.pop().users:
            if operation(user) in ("topk", "sort", "argsort"):
                return True
            if user not in seen and effect(user) in _ON_ELEMENTS:
                seen.add(user)
                queue.append(user)
    return False


def _not_one_matrix(graph: Graph, parameter: str) -> str:
    shape = tuple(graph.trace.module.get_parameter(parameter).shape)
    readers = _readers(_placeholder(graph, parameter))
    if not readers:
        return "nothing in the traced call reads it: it belongs to a branch that token ids alone do not reach"
    names = _names(readers)
    products = (linear for keys in graph.linears.values() for key in keys if (linear := graph.linear(key)) is not None)
    weight = next((linear.weight for linear in products if linear.bias == parameter), None)
    if weight is not None:
        return f"it is no matrix of a linear map, but the bias of `{weight}`: what becomes of that becomes of it"
    if _makes_a_matrix(graph, parameter):
        return (
            f"the matrix that is multiplied is computed from it on every call, by {names}: it can be made smaller once "
            "the result is stored as the weight itself"
        )
    if all(effect(node) in ELEMENTWISE for node in readers):
        return f"it is no matrix of a linear map: its values are used one by one, by {names}"
    if any(operation(node) in _CONVOLUTIONS for node in readers):
        if set(shape[2:]) == {1}:
            return f"it is the kernel of a convolution of one position ({names}): as a linear layer it would be found"
        return f"it is the kernel of a convolution over positions ({names}), which no pattern reaches through"
    if len(shape) > 2 and {operation(user) for user in _placeholder(graph, parameter).users} <= _TAKES_ONE:
        return (
            f"it holds {shape[0]} times {'×'.join(map(str, shape[1:]))} values in one tensor, and each is taken alone, "
            f"to {names}: what is made smaller must be a parameter of its own"
        )
    if len(shape) == 3:
        return (
            f"it holds {shape[0]} matrices of {shape[1]}×{shape[2]} in one tensor, read by {names}; such matrices are "
            "followed where one operation multiplies by all of them (`grouped_mm`, `bmm`), so they are left as they are"
        )
    return f"it is not multiplied as one matrix: its {'×'.join(map(str, shape))} values go to {names}"


def _makes_a_matrix(graph: Graph, parameter: str) -> bool:
    """Whether what is computed from a parameter, and from no input, is what a product multiplies by."""
    start = _placeholder(graph, parameter)
    queue, seen, computed = [start], {start}, False
    while queue:
        for user in queue.pop().users:
            operands = [node for node in user.all_input_nodes if effect(node) is not Effect.SIZE]
            if effect(user) in (Effect.LINEAR, Effect.PRODUCT_SUM):
                if computed and len(operands) > 1 and operands[1] in seen - {start}:
                    return True
            elif user not in seen and user.op == "call_function" and all(_is_of_the_model(graph, n) for n in operands):
                computed |= effect(user) not in (Effect.MOVE, Effect.SAME)
                seen.add(user)
                queue.append(user)
    return False


def _is_of_the_model(graph: Graph, node: fx.Node) -> bool:
    """Whether a value depends on no input."""
    queue, seen = [node], {node}
    while queue:
        one = queue.pop()
        if one.name in graph.trace.inputs:
            return False
        new = set(one.all_input_nodes) - seen
        seen |= new
        queue += new
    return True


def _placeholder(graph: Graph, parameter: str) -> fx.Node:
    names = {key for key, value in graph.trace.state.items() if value == parameter}
    return next(node for node in graph.trace.graph.nodes if node.name in names)


def _readers(start: fx.Node) -> list[fx.Node]:
    """The first operations after a value that are more than data movement."""
    found, seen, queue = [], {start}, [start]
    while queue:
        node = queue.pop()
        for user in node.users:
            if user in seen or not is_data(user):
                continue
            seen.add(user)
            (queue if effect(user) in (Effect.MOVE, Effect.SAME) else found).append(user)
    return found


def _writers(graph: Graph, key: str) -> list[fx.Node]:
    """The first operations before a product with a matrix that are more than data movement."""
    found, seen, queue = [], set(), list(graph.operands(key))
    while queue:
        one = queue.pop()
        if one in seen:
            continue
        seen.add(one)
        if graph.effect(one) is Effect.MOVE:
            queue += graph.operands(one)
        else:
            found.append(graph.traced(one))
    return found


def _names(nodes: Iterable[fx.Node]) -> str:
    names: Sequence[str] = sorted({operation(node).removesuffix("_") for node in nodes if node.op == "call_function"})
    if not names:
        return "an input"
    shown = [f"`{name}`" for name in names[:_MOST_READERS]]
    return listed([*shown, "others"] if len(names) > _MOST_READERS else shown)
