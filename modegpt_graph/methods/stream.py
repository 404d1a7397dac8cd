"""The residual stream, found in the graph of a whole model: what decoder layers add to, and which norms read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import networkx

from modegpt_graph.flow.elements import shape_of
from modegpt_graph.methods.common import Setting, Unavailable
from modegpt_graph.methods.matrices import MatrixModule, matrix_modules
from modegpt_graph.methods.norms import Norm, recognise
from modegpt_graph.trace.graph import Graph, normalise

RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})


@dataclass(frozen=True)
class Reader:
    """A norm module that reads the stream, and the matrices that read the norm."""

    path: str
    norm: Norm
    matrices: tuple[MatrixModule, ...]


@dataclass(frozen=True)
class Step:
    """One point of the stream, and what is added to it next.

    readers: of the stream at this point.   writers: matrices whose outputs are added.
    carrier: the writer that runs after the first reader, and what its product is multiplied by before it is added;
    None where nothing reads this point.
    """

    readers: tuple[Reader, ...]
    writers: tuple[MatrixModule, ...]
    carrier: tuple[MatrixModule, float] | None


@dataclass(frozen=True)
class Stream:
    """width: of the stream.   steps: in order, from the first decoder layer's input to the last one's output.

    centred: whether the norms that read it subtract the mean.
    """

    width: int
    steps: tuple[Step, ...]
    centred: bool


def find_stream(setting: Setting) -> Stream:
    """The residual stream through all decoder layers.

    Raises Unavailable, with where and why, where it cannot be established: something else than a norm module reads it,
    a norm feeds something else than matrices, or what is added does not come straight from a matrix.
    """
    finder = _Finder(normalise(setting.surveyed.trace), setting, {one.weight: one for one in matrix_modules(setting)})
    steps: list[Step] = []
    end: str | None = None
    for path in setting.layers:
        points, writers = finder.chain(path)
        if end is not None and points[0] != end:
            raise Unavailable(f"{path} does not go on from the stream that the layer before it leaves")
        steps += [
            finder.step(point, after, added) for (point, after), added in zip(pairwise(points), writers, strict=True)
        ]
        end = points[-1]
    assert end is not None
    kinds = {reader.norm.kind for step in steps for reader in step.readers}
    if kinds == {"layer"}:
        # The stream is centred from the start, so what comes after the layers must not miss its mean.
        kinds |= {finder.norm(path, end).kind for path in finder.reading(end)}
    if len(kinds) != 1:
        raise Unavailable("norms of different kinds, or none, read the residual stream")
    return Stream(shape_of(finder.graph.traced(end))[-1], tuple(steps), kinds == {"layer"})


@dataclass(frozen=True)
class _Finder:
    graph: Graph
    setting: Setting
    modules: Mapping[str, MatrixModule]

    def chain(self, layer: str) -> tuple[list[str], list[list[str]]]:
        """Points of the stream in a layer, its input first, and what is added between each two."""
        inside = {key for key in self.graph.nodes if f"module.{layer}" in self._stack(key)}
        leaving = [key for key in inside if not inside.issuperset(self.graph.nodes.successors(key))]
        if len(leaving) != 1:
            raise Unavailable(f"{layer}: {len(leaving)} values leave the layer, or one several times; one is followed")
        sources = [leaf for leaf in self._terms(leaving[0], inside) if leaf not in inside]
        if len(sources) != 1:
            raise Unavailable(f"{layer}: what leaves the layer is not its input with something added")
        points, added = [self._seen_through(leaving[0])], []
        while points[-1] != sources[0]:
            operands = [self._seen_through(operand) for operand in self.graph.operands(points[-1])]
            further = [one for one in operands if sources[0] in self._terms(one, inside)]
            if len(further) != 1:
                raise Unavailable(f"{layer}: the residual stream is added to itself")
            others = [one for one in operands if one != further[0]]
            added.append([leaf for one in others for leaf in self._terms(one, inside)])
            points.append(further[0])
        return points[::-1], added[::-1]

    def step(self, point: str, after: str, added: list[str]) -> Step:
        """The readers of a point, and the writers on the way to the next."""
        readers = tuple(self._reader(path, point) for path in self.reading(point, after))
        writers = {leaf: self._writer(leaf) for leaf in added}
        carrier = None
        if readers:
            norm = self._result_of(readers[0].path)
            later = [one for leaf, one in writers.items() if norm in networkx.ancestors(self.graph.nodes, leaf)]
            if not later:
                raise Unavailable(f"nothing that is added to the stream next depends on {readers[0].path}")
            carrier = later[0]
        return Step(readers, tuple(one for one, _ in writers.values()), carrier)

    def reading(self, point: str, after: str | None = None) -> list[str]:
        """Paths of the modules that read a point of the stream; `after` is the next point, which adds to it."""
        paths = dict.fromkeys(self._stack(user)[-1] for user in self._users(point) if user != after)
        return [path.removeprefix("module").removeprefix(".") for path in paths]

    def norm(self, path: str, point: str) -> Norm:
        """What the module at `path` does to a point of the stream."""
        width = shape_of(self.graph.traced(point))[-1]
        norm = recognise(self.setting.dense.get_submodule(path), width)
        if norm is None:
            raise Unavailable(f"the residual stream is read by {path or 'the model itself'}, which is no norm module")
        return norm

    def _reader(self, path: str, point: str) -> Reader:
        norm = self.norm(path, point)
        matrices = []
        for user in self._users(self._result_of(path)):
            linear = self.graph.linear(user)
            if linear is None or linear.weight not in self.modules:
                said = self.graph.operation(user)
                raise Unavailable(f"{path} is read by `{said}`, which is no matrix module that its scale could go into")
            matrices.append(self.modules[linear.weight])
        return Reader(path, norm, tuple(matrices))

    def _result_of(self, path: str) -> str:
        """The value that a module hands on."""
        own = {key for key in self.graph.nodes if self._stack(key)[-1] == f"module.{path}"}
        leaving = [key for key in own if not own.issuperset(self.graph.nodes.successors(key))]
        if len(leaving) != 1:
            raise Unavailable(f"{path} hands on {len(leaving)} values, or one several times")
        return leaving[0]

    def _writer(self, leaf: str) -> tuple[MatrixModule, float]:
        """The matrix whose product, times a number, is added to the stream; and that number."""
        factor, key = 1.0, leaf
        while (number := self._multiplier(key)) is not None:
            factor, (key, *_) = factor * number, self.graph.operands(key)
        linear = self.graph.linear(key)
        if linear is None or linear.weight not in self.modules:
            where, said = self._stack(leaf)[-1].removeprefix("module."), self.graph.operation(leaf)
            raise Unavailable(
                f"what is added to the residual stream comes from `{said}` in {where}, not from a matrix module: "
                "no rotation can be folded into it"
            )
        if len(self._users(leaf)) != 1 or len(self._users(key)) != 1:
            raise Unavailable(f"{linear.weight}: its product is added to the residual stream and read elsewhere too")
        return self.modules[linear.weight], factor

    def _multiplier(self, key: str) -> float | None:
        """The number that a value is multiplied by, None where it is no product with a number."""
        node = self.graph.traced(key)
        if self.graph.operation(key).removesuffix("_") != "mul" or len(self.graph.operands(key)) != 1:
            return None
        return next((float(value) for value in node.args if isinstance(value, (int, float)) and value), None)

    def _terms(self, key: str, inside: set[str]) -> list[str]:
        """What is summed to a value within a layer."""
        key = self._seen_through(key)
        operands = self.graph.operands(key)
        plain = not self.graph.traced(key).kwargs and len(operands) == 2
        if key not in inside or self.graph.operation(key).removesuffix("_") != "add" or not plain:
            return [key]
        return [leaf for operand in operands for leaf in self._terms(operand, inside)]

    def _users(self, key: str) -> list[str]:
        """What reads a value, as it is or with its leading axes laid out anew."""
        found: list[str] = []
        for user in self.graph.nodes.successors(key):
            found += self._users(user) if self._seen_through(user) != user else [user]
        return found

    def _seen_through(self, key: str) -> str:
        """The value that `key` is with its leading axes laid out anew."""
        while self.graph.operation(key) in RESHAPES:
            (source, *_) = self.graph.operands(key)
            if shape_of(self.graph.traced(source))[-1] != shape_of(self.graph.traced(key))[-1]:
                break
            key = source
        return key

    def _stack(self, key: str) -> list[str]:
        """Paths of the modules that a node belongs to, the innermost last."""
        stack = self.graph.traced(key).meta.get("nn_module_stack") or {}
        return [where for where, _ in stack.values()] or ["module"]
