"""A traced module, with edits and observers, as the source of a forward method.

The method has the signature of the module's own. Projections are called as the modules they are, the attention
interface and the cache are the library's again, sizes that follow batch and length are read from the inputs, and what
differs between layers of one topology (new sizes, gathered positions, the layer's number) is read from attributes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from modegpt_graph.codegen.expressions import EmitError, attribute, call, identifier, literal
from modegpt_graph.codegen.gather import gathered
from modegpt_graph.codegen.guards import guards
from modegpt_graph.codegen.layout import wrapped
from modegpt_graph.codegen.signature import LEADING, Signature
from modegpt_graph.codegen.stores import InPlace, ending, in_place, refuse_returned, statement
from modegpt_graph.flow.elements import shape_of
from modegpt_graph.flow.shrink import Edits
from modegpt_graph.trace.export import Output, Trace
from modegpt_graph.trace.limits import DtypeLimit
from modegpt_graph.trace.linear import Linear, find_linears
from modegpt_graph.trace.opaque import AttentionCall, AttentionWeights, CacheCall
from modegpt_graph.trace.operations import Effect, arguments, effect, operation
from modegpt_graph.trace.stores import stores_of

WIDTH = 96
_CLASS_INDENT = 4


@dataclass(frozen=True)
class Forward:
    """The source of a forward method and what it reads from its module.

    source: `def forward(self, …)`, with no indentation.   imports: name → (module, qualified name).
    attributes: whole numbers.   buffers: positions that are gathered, and constants made while tracing.
    """

    source: str
    imports: Mapping[str, tuple[str, str]]
    attributes: Mapping[str, int]
    buffers: Mapping[str, Tensor]


@dataclass
class _Writer:
    trace: Trace
    edits: Edits
    linear_modules: Collection[str]
    observed: Mapping[str, fx.Node]
    prefix: str = ""
    known: Collection[str] = ()
    lines: list[str] = field(default_factory=list)
    text: dict[fx.Node, str] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    weights: str | None = None

    def __post_init__(self) -> None:
        self.linears: dict[fx.Node, Linear] = {
            node: linear for node, linear in find_linears(self.trace).items() if self._is_module_call(linear)
        }
        self.arguments = {
            node: self.edits.arguments.get(node, (node.target, node.args, node.kwargs))
            for node in self.trace.graph.nodes
        }
        self.stores = stores_of(self.trace.graph)
        self.in_place = {store: found for store in self.stores if (found := in_place(store)) is not None}
        self.finals = {found.final: found for found in self.in_place.values()}
        self.inner = frozenset(node for found in self.in_place.values() for node in found.inner)
        self.signature = Signature(self.trace, [linear.source for linear in self.linears.values()])

    def _is_module_call(self, linear: Linear) -> bool:
        """Whether a product with a matrix is the whole forward of a module that holds nothing else."""
        path, _, _ = linear.weight.rpartition(".")
        owner = self.trace.module.get_submodule(path)
        names = {f"{path}.{name}" for name, _ in owner.named_parameters(recurse=False)}
        plain = names == {linear.weight, linear.bias} - {None}
        return plain and linear.experts is None and (path in self.linear_modules or type(owner) is nn.Linear)

    def live(self) -> set[fx.Node]:
        """Nodes that the outputs, the observers and later calls need."""
        output = self.trace.graph.output_node()
        queue: list[fx.Node] = [*output.all_input_nodes, *self.observed.values(), *self.stores]
        seen: set[fx.Node] = set()
        while queue:
            node = queue.pop()
            if node not in seen:
                seen.add(node)
                queue += self._operands(node)
        return seen

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        if operation(node) in ("sym_size", "cache_update"):
            return [] if operation(node) == "sym_size" else list(arguments(node)[:2])
        if node in self.linears:
            return [self.linears[node].source]
        found: list[fx.Node] = []
        _, args, kwargs = self.arguments[node]
        fx.map_arg((args, kwargs), lambda operand: found.append(operand))
        return found

    def write(self, value: Any, node: fx.Node) -> str:
        """An argument of `node` as source."""
        if isinstance(value, fx.Node):
            text = self.text[value]
            gather = self.edits.gathers.get((node, value))
            if gather is None:
                return text
            index = self._buffer(f"index_{value.name}", gather.index)
            return gathered(text, index, gather, shape_of(value))
        if isinstance(value, torch.SymInt):
            return self.signature.size(value)
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self.write(item, node) for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, torch.device):
            return f"{self.signature.main_expression()}.device"
        if isinstance(value, DtypeLimit) and self.signature.main.meta["val"].is_floating_point():
            return value.written(f"{self.signature.main_expression()}.dtype")
        if value is self.signature.main.meta["val"].dtype:
            return f"{self.signature.main_expression()}.dtype"
        return literal(value)

    def _buffer(self, name: str, value: Tensor) -> str:
        for known, other in self.buffers.items():
            if other.shape == value.shape and torch.equal(other, value):
                return f"self.{known}"
        base, number = identifier(f"{self.prefix}{name}"), 2
        name = base
        while name in self.buffers:
            name, number = f"{base}_{number}", number + 1
        self.buffers[name] = value
        return f"self.{name}"

    def expression(self, node: fx.Node) -> str:
        """A node's value as source."""
        if node.op == "placeholder":
            if node.name in self.signature.inputs:
                return self.signature.inputs[node.name]
            if node.name in self.trace.state:
                return attribute(self.trace.state[node.name])
            constant = self.trace.constants[node.name]
            if isinstance(constant, FakeTensor) or constant.is_meta:
                raise EmitError("it reads a tensor from where no code can find it again: register it as a buffer")
            return self._buffer(f"constant_{node.name.rpartition('lifted_tensor_')[2]}", constant)
        name = operation(node)
        if name == "sym_size":
            value = node.meta["val"]
            return self.signature.size(value) if isinstance(value, torch.SymInt) else str(int(value))
        if node in self.linears:
            path = self.linears[node].weight.rpartition(".")[0]
            return f"{attribute(path)}({self.write(self.linears[node].source, node)})"
        target, args, kwargs = self.arguments[node]
        said = operation(node) if target is node.target else target._opname
        if said in ("view", "_unsafe_view") and args[0] not in self.linears:
            said = "reshape"  # kernels differ in how they lay their results out in memory
        raw = tuple(args)
        written = tuple(self._argument(node, n, value) for n, value in enumerate(args))
        return call(
            said,
            target,
            written,
            {key: self.write(value, node) for key, value in kwargs.items()},
            raw,
        )

    def _argument(self, node: fx.Node, number: int, value: Any) -> str:
        """An argument; numbers that an edit changed become attributes."""
        if node not in self.edits.arguments:
            return self.write(value, node)
        old = arguments(node)[number] if number < len(node.args) else None
        if isinstance(value, int) and not isinstance(value, bool) and value != old:
            return self._attribute(f"size_{node.name}_{number}", value)
        if isinstance(value, (list, tuple)) and not isinstance(old, fx.Node):
            known: list[Any] = list(old) if isinstance(old, (list, tuple)) and len(old) == len(value) else []
            parts = [
                self._attribute(f"size_{node.name}_{number}_{place}", item)
                if isinstance(item, int) and not (known and known[place] == item)
                else self.write(item, node)
                for place, item in enumerate(value)
            ]
            return f"[{', '.join(parts)}]"
        return self.write(value, node)

    def _attribute(self, name: str, value: int) -> str:
        name = identifier(f"{self.prefix}{name}")
        self.attributes[name] = int(value)
        return f"self.{name}"

    def emit(self) -> Forward:
        live = self.live()
        uses: dict[fx.Node, int] = {}
        for node in [*live, self.trace.graph.output_node()]:
            for operand in self._operands(node) if node.op != "output" else node.all_input_nodes:
                uses[operand] = uses.get(operand, 0) + 1
        watched: dict[fx.Node, list[str]] = {}
        for name, node in self.observed.items():
            watched.setdefault(node, []).append(name)
        for node in self.trace.graph.nodes:
            if node in live:
                self._statement(node, uses.get(node, 0), node in watched)
                for name in watched.get(node, ()):
                    self.lines.append(f"self.observe({name!r}, {self.text[node]})")
        rest = [arguments(store) for store in self.stores if store not in self.in_place]
        refuse_returned(self.trace.graph.output_node(), [kept for kept, _ in rest])
        self.lines += ending(self._returned(), [(self._kept(kept), self.text[value]) for kept, value in rest])
        lines = [*guards(self.trace, self.known), *self.signature.leading_sizes(), *self.lines]
        statements = [self.signature.definition(), *(f"    {line}" for line in lines)]
        body = "\n".join(line for statement in statements for line in wrapped(statement, _CLASS_INDENT))
        return Forward(f"{body}\n", self.imports, self.attributes, self.buffers)

    def _statement(self, node: fx.Node, uses: int, watched: bool) -> None:
        if node in self.inner or node in self.stores:
            return
        if node in self.finals:
            self._write_in_place(self.finals[node])
        elif operation(node) == "attention":
            self._attention(node)
        elif effect(node) is Effect.CACHE:
            self._cache(node)
        elif (
            node.op == "call_function"
            and operation(node) == "getitem"
            and node not in self.edits.arguments
            and self.text[arguments(node)[0]].startswith("\0")
        ):
            self.text[node] = self.text[arguments(node)[0]][1:].split(", ")[arguments(node)[1]]
        else:
            text = self.expression(node)
            inline = node.op == "placeholder" or effect(node) is Effect.SIZE
            inline |= uses == 1 and not watched and len(text) < WIDTH // 2 and node not in self.linears
            factor = self.edits.factors.get(node)
            if factor is not None:
                name = self._variable(node)
                buffer = identifier(f"{self.prefix}factor_{node.name}")
                self.buffers[buffer] = factor
                self.lines += [f"{name} = {text}", f"{name} = {name} * self.{buffer}.to({name}.dtype)"]
                self.text[node] = name
                return
            unchanged = bool(node.args) and text == self.text.get(arguments(node)[0])
            if inline or unchanged:
                self.text[node] = text
            else:
                name = self._variable(node)
                self.lines.append(f"{name} = {text}")
                self.text[node] = name

    def _variable(self, node: fx.Node) -> str:
        linear = self.linears.get(node)
        base = identifier(node.name if linear is None else linear.weight.split(".")[-2])
        taken = {*self.text.values(), *LEADING, *self.signature.parameters}
        name, number = base, 2
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        return name

    def _attention(self, node: fx.Node) -> None:
        said = self.trace.calls[arguments(node)[6]]
        assert isinstance(said, AttentionCall)
        module = self._module_expression(said.path)
        fallback = said.fallback
        self.imports["ALL_ATTENTION_FUNCTIONS"] = ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS")
        self.imports[fallback.__name__] = (fallback.__module__, fallback.__qualname__)
        query, key, value, mask, extras, scale = arguments(node)[:6]
        operands = [self.write(operand, node) for operand in (query, key, value, mask)]
        keywords = {"scaling": literal(scale)}
        keywords |= {name: self.write(extra, node) for name, extra in zip(said.tensors, extras, strict=True)}
        keywords |= {name: literal(value) for name, value in said.constants.items()}
        rest = [f"{name}={text}" for name, text in keywords.items()]
        starred = self._passed_on(said)
        self.lines.append(
            "attention = ALL_ATTENTION_FUNCTIONS.get_interface("
            f"{module}.config._attn_implementation, {fallback.__name__})"
        )
        output = self._variable(node)
        output = "attention_output" if output == "attention" else f"{output}_output"
        self.weights = f"{output.removesuffix('_output')}_weights"
        if not self.edits.empty:
            operands[:3] = self._one_head_size(operands[:3])
        inner = ", ".join([module, *operands, *rest, *starred])
        self.lines.append(f"{output}, {self.weights} = attention({inner})")
        if not self.edits.empty:
            self.lines.append(f"{output} = {output}[..., :value_size]")
        self.text[node] = output

    def _one_head_size(self, operands: list[str]) -> list[str]:
        """Pad queries and keys, or values, to one size: the fused kernels take no others, and what stands in for them
        takes several times as long, for a prompt as for a single new token."""
        names = ["query", "key", "value"]
        self.lines += [f"{name} = {text}" for name, text in zip(names, operands, strict=True) if name != text]
        self.lines += [
            "head_size, value_size = max(query.size(-1), value.size(-1)), value.size(-1)",
            "if query.size(-1) < head_size:",
            "    query, key = (nn.functional.pad(states, (0, head_size - states.size(-1))) for states in (query, key))",
            "elif value_size < head_size:",
            "    value = nn.functional.pad(value, (0, head_size - value_size))",
        ]
        return names

    def _passed_on(self, said: AttentionCall) -> list[str]:
        keywords = self.signature.keywords
        if keywords is None or (self.trace.call.extra and not said.passed_through):
            return []
        return [f"**{keywords}"]

    def _module_expression(self, path: str | None) -> str:
        if path is None:
            raise EmitError("attention is called for a module outside of the one that was traced")
        return attribute(path) if path else "self"

    def _cache(self, node: fx.Node) -> None:
        said = self.trace.calls[arguments(node)[3]]
        assert isinstance(said, CacheCall)
        whole = cache = self.signature.cache()
        if said.part is not None:  # a cache of another kind that is handed in has no such part
            cache = f'getattr({whole}, "{said.part}", {whole})'
        key, value = self.write(arguments(node)[0], node), self.write(arguments(node)[1], node)
        number = sum(isinstance(call, CacheCall) for call in self.trace.calls[: arguments(node)[3]])
        name = "cache_layer" if number == 0 else f"cache_layer_{number + 1}"
        layer = self._attribute(name, said.layer)
        names = ["key_states", "value_states"]
        for name, text in zip(names, (key, value), strict=True):
            if name != text:
                self.lines.append(f"{name} = {text}")
        self.lines.append(f"if {whole} is not None:")
        self.lines.append(f"    key_states, value_states = {cache}.update(key_states, value_states, {layer})")
        self.text[node] = "\0" + ", ".join(names)

    def _nth_argument(self, node: fx.Node, number: int) -> str:
        return self._argument(node, number, self.arguments[node][1][number])

    def _kept(self, node: fx.Node) -> str:
        """What is kept, as source."""
        if node.name not in self.trace.state:
            raise EmitError(f"it writes into `{self.signature.inputs.get(node.name, node.name)}`, which is not its own")
        return attribute(self.trace.state[node.name])

    def _write_in_place(self, found: InPlace) -> None:
        text = self._kept(found.kept)
        for write in found.writes:
            self.lines.append(statement(text, write, lambda node: self.arguments[node][1], self._nth_argument))
        kept, final = (node.meta["val"].dtype for node in (found.kept, found.final))
        self.text[found.final] = text if kept is final else f"{text}.to({self.write(final, found.final)})"

    def _returned(self) -> str:
        (tensors,) = arguments(self.trace.graph.output_node())

        def write(leaf: Any) -> str:
            if isinstance(leaf, Output):
                return self.text[tensors[leaf.index]]
            if isinstance(leaf, AttentionWeights):
                return self.weights or "None"
            if hasattr(leaf, "get_seq_length"):
                return self.signature.cache()
            return literal(leaf)

        output = self.trace.output
        if isinstance(output, (tuple, list)) and type(output) in (tuple, list):
            inner = ", ".join(write(leaf) for leaf in output)
            return f"[{inner}]" if isinstance(output, list) else inner + ("," if len(output) == 1 else "")
        leaves = pytree.tree_leaves(output)
        if len(leaves) != 1 or leaves[0] is not output:
            raise EmitError(f"the module returns a {type(output).__name__}")
        return write(output)


def emit(
    trace: Trace,
    edits: Edits | None = None,
    linear_modules: Collection[str] = (),
    observed: Mapping[str, fx.Node] | None = None,
    prefix: str = "",
    known: Collection[str] = (),
) -> Forward:
    """Write a traced module's forward method.

    linear_modules: paths of modules that will be `nn.Linear` when the method runs, beside those that are already.
    observed: name → node; the method calls `self.observe(name, value)` as soon as it has the value.
    prefix: of the names of the attributes and buffers that it reads beside the module's own.
    known: names of arguments whose constants have been told apart before the method's body.
    Raises EmitError where an operation has no Python form.
    """
    return _Writer(trace, edits or Edits(), linear_modules, observed or {}, prefix, known).emit()
