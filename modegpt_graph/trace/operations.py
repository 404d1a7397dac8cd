"""The table of operations: what each does along the feature axis. An operation that is not here proves nothing."""

from enum import Enum, auto
from typing import Any

from torch import fx


class Effect(Enum):
    """What an operation does to the features of its operands."""

    MOVE = auto()  # every output element is one input element, or padding
    SAME = auto()  # the value itself: casts, copies, dropout at evaluation
    LINEAR_UNARY = auto()  # the same linear function of every element
    UNARY = auto()  # the same non-linear function of every element
    SUM = auto()  # element-wise, linear in every operand
    PRODUCT = auto()  # element-wise, not linear
    REDUCE = auto()  # elements along some axes meet
    LINEAR = auto()  # features times a weight matrix
    PRODUCT_SUM = auto()  # two tensors contracted along one axis
    ATTENTION = auto()  # softmax attention in one operation
    FRESH = auto()  # a new tensor: only sizes are read from its operand
    COMPLEX = auto()  # pairs of features become complex numbers
    REAL = auto()  # complex numbers become pairs of features
    CACHE = auto()  # keys and values of all positions so far
    STORE = auto()  # a value that is kept beyond the call
    SIZE = auto()  # sizes and guards: no tensor values
    UNKNOWN = auto()


_TABLE: dict[Effect, str] = {
    Effect.MOVE: """view _unsafe_view reshape transpose permute t T mT expand expand_as view_as reshape_as slice
        select split split_with_sizes chunk unbind cat concat stack unsqueeze squeeze repeat repeat_interleave flatten
        unflatten roll
        flip movedim swapaxes swapdims moveaxis narrow index_select tensor_split constant_pad_nd pad tile getitem
        broadcast_to index numpy_T unfold slice_scatter select_scatter copy index_put index_copy""",
    Effect.SAME: """clone contiguous alias detach _to_copy to dropout lift_fresh lift_fresh_copy type_as
        native_dropout feature_dropout""",
    Effect.LINEAR_UNARY: "neg",
    Effect.UNARY: """relu silu gelu tanh sigmoid exp expm1 log log1p sqrt rsqrt reciprocal abs square clamp
        clamp_min clamp_max hardtanh hardsigmoid hardswish leaky_relu elu selu celu mish softplus relu6 erf sin cos
        threshold log_sigmoid sign floor round exp2 logical_not sinh cosh atan softshrink hardshrink tanhshrink
        bitwise_not""",
    Effect.SUM: "add sub rsub",
    Effect.PRODUCT: """mul div pow maximum minimum where masked_fill fmod remainder eq ne lt le gt ge
        logical_and logical_or bitwise_and bitwise_or xlogy atan2""",
    Effect.REDUCE: """mean sum var std amax amin max min norm linalg_vector_norm softmax _softmax log_softmax
        _log_softmax cumsum prod logsumexp layer_norm native_layer_norm rms_norm group_norm var_mean any all argmax topk
        sort""",
    Effect.LINEAR: "linear",
    Effect.PRODUCT_SUM: "matmul mm bmm addmm baddbmm",
    Effect.ATTENTION: "attention scaled_dot_product_attention",
    Effect.FRESH: """new_empty new_zeros new_ones new_full empty_like zeros_like ones_like full_like rand_like
        randn_like""",
    Effect.COMPLEX: "view_as_complex",
    Effect.REAL: "view_as_real",
    Effect.CACHE: "cache_update",
    Effect.STORE: "store",
    Effect.SIZE: """sym_size _assert_scalar _assert_async _assert_tensor_metadata sym_constrain_range
        sym_constrain_range_for_size""",
}
# Operations whose name stands for two things are told by their overload: `max(x)` reduces, `max(x, y)` does not.
_OVERLOADS: dict[tuple[str, str], Effect] = {("min", "other"): Effect.PRODUCT, ("max", "other"): Effect.PRODUCT}
_LIKE_ANOTHER = frozenset({"type_as", "view_as", "expand_as", "reshape_as"})
EFFECTS: dict[str, Effect] = {name: effect for effect, names in _TABLE.items() for name in names.split()}


def operation(node: fx.Node) -> str:
    """Plain name of a node's operation: `view`, `silu`, `linear`; `placeholder` and `output` for the graph's ends."""
    if node.op != "call_function":
        return node.op
    target = node.target
    return getattr(target, "_opname", None) or getattr(target, "__name__", str(target))


def effect(node: fx.Node) -> Effect:
    """Effect of a node's operation, from the table."""
    if node.op != "call_function":
        return Effect.UNKNOWN
    name = operation(node)
    overload = _OVERLOADS.get((name, getattr(node.target, "_overloadname", "")))
    return overload or EFFECTS.get(name) or EFFECTS.get(name.removesuffix("_"), Effect.UNKNOWN)


def data_operands(node: fx.Node) -> list[fx.Node]:
    """Operands whose values reach the result, in argument order, one entry a use; not those read for shape or dtype."""
    if effect(node) is Effect.FRESH:
        return []
    arguments = node.args[:1] if operation(node) in _LIKE_ANOTHER else (node.args, node.kwargs)
    found: list[fx.Node] = []
    fx.map_arg(arguments, lambda operand: found.append(operand))
    return found


def arguments(node: fx.Node) -> list[Any]:
    """Positional arguments of a node. torch.fx types them as a union wider than any operation's own signature."""
    return list(node.args)


def is_data(node: fx.Node) -> bool:
    """Whether a node carries tensor values."""
    return node.op in ("placeholder", "call_function") and effect(node) is not Effect.SIZE
