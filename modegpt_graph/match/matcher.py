"""Find where a pattern's formula stands in a normalised graph, and say how far it got where it does not.

Matching walks against the data flow, from the outermost application inwards. Data movement is transparent, products and
sums match in any order, and a chain of element-wise operations with one source counts as one function of that source.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations

from modegpt_graph.match.formula import Apply, Combine, Expression, Name, parts_of
from modegpt_graph.match.patterns import OPERATIONS, Pattern
from modegpt_graph.match.place import place_of
from modegpt_graph.trace.graph import ELEMENTWISE, Graph
from modegpt_graph.trace.operations import Effect

LARGEST_PRODUCT = 6
MOST_TRIES = 5_000  # of parts of one formula at one node: the orders of products within products multiply
MOST_PARTS = 512  # of values side by side, that one form is tried behind
MOST_IN_A_CHAIN = 64  # operations behind which a product or an attention is looked for


@dataclass(frozen=True)
class Match:
    """One place where a form of a pattern stands.

    linears: role → node of the product with its matrix.   operations: built-in operation → its node.
    values: role → node whose value the role stands for (the matrix's output, or the part of it that is used here).
    """

    pattern: Pattern
    variant: str
    linears: Mapping[str, str]
    operations: Mapping[str, str]
    values: Mapping[str, str]


@dataclass(frozen=True)
class Miss:
    """Why a form does not stand at a node: where it stopped, and how many of its steps had matched.

    start: the node that was tried.   place: of the operation that stopped it.   steps: applications, products and sums
    of the form.   linears: role → node, in the order in which they matched.   beyond_first: roles matched after the
    outermost application, which any matrix product may be.
    """

    pattern: str
    variant: str
    start: str
    place: str
    expected: str
    found: str
    matched: int
    steps: int
    linears: Mapping[str, str]
    beyond_first: frozenset[str]

    def __str__(self) -> str:
        got = ", ".join(f"`{role}`" for role in self.linears)
        far = f"{self.matched} of {self.steps} steps had matched"
        return f"expected {self.expected}, found {self.found} in {self.place}; {far}{f', with {got}' * bool(got)}"


@dataclass
class _State:
    linears: dict[str, str] = field(default_factory=dict)
    operations: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    matched: int = 0

    def copy(self) -> "_State":
        return _State(dict(self.linears), dict(self.operations), dict(self.values), dict(self.variables), self.matched)


class _Stopped(Exception):
    def __init__(self, node: str, expected: str, found: str, state: _State) -> None:
        super().__init__(expected)
        self.node, self.expected, self.found, self.state = node, expected, found, state


class Matcher:
    """Matches patterns against one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._root = cache(self._find_root)
        self._tries = 0
        self._parts: dict[str, int] = {}  # of values side by side: the one that the way back goes through

    def find(self, pattern: Pattern) -> tuple[list[Match], list[Miss]]:
        """Every match of a pattern, and for every other candidate node its best near miss."""
        matches, misses = [], []
        for start in self._candidates(pattern):
            best: Miss | None = None
            for variant, form in pattern.forms().items():
                found, stop = self._attempts(form, start, pattern)
                if found:
                    matches += [Match(pattern, variant, one.linears, one.operations, one.values) for one in found]
                    best = None
                    break
                if stop is not None:
                    miss = self._miss(pattern, variant, form, start, stop)
                    if best is None or miss.matched > best.matched:
                        best = miss
            if best is not None:
                misses.append(best)
        return matches, misses

    def _attempts(self, form: Expression, start: str, pattern: Pattern) -> tuple[list[_State], _Stopped | None]:
        """Every way in which a form stands at a node, or what stopped the one that got furthest.

        Where the way back comes to several values side by side, it goes on from each of them.
        """
        found: list[_State] = []
        best: _Stopped | None = None
        queue: list[dict[str, int]] = [{}]
        for self._parts in queue:
            try:
                self._tries = 0
                found.append(self._match(form, start, _State(), pattern))
            except _Stopped as stop:
                if best is None or stop.state.matched > best.state.matched:
                    best = stop
                parts = self._carrying(stop.node)
                spread = self.graph.effect(stop.node) is Effect.MOVE and len(parts) > 1
                if spread and stop.node not in self._parts and len(queue) + len(parts) <= MOST_PARTS:
                    queue += [{**self._parts, stop.node: number} for number in range(len(parts))]
        self._parts = {}
        return found, best

    def _miss(self, pattern: Pattern, variant: str, form: Expression, start: str, stop: _Stopped) -> Miss:
        state = stop.state
        roles = frozenset(state.linears) - {getattr(form, "name", None)}
        steps = sum(not isinstance(part, Name) for part in parts_of(form))
        place = place_of(self.graph.traced(stop.node))
        return Miss(
            pattern.name, variant, start, place, stop.expected, stop.found, state.matched, steps, state.linears, roles
        )

    def _carrying(self, key: str) -> list[str]:
        return [operand for operand in self.graph.operands(key) if self.graph.carries(operand)]

    def _candidates(self, pattern: Pattern) -> Iterator[str]:
        outermost = {form.name for form in pattern.forms().values() if isinstance(form, Apply)}
        wanted = {name if name in OPERATIONS else "linear" for name in outermost}
        for key in self.graph.nodes:
            if self.graph.operation(key) in wanted:
                yield key

    def _match(self, form: Expression, key: str, state: _State, pattern: Pattern) -> _State:
        self._tries += 1
        if self._tries > MOST_TRIES:
            raise _Stopped(key, "a simpler formula", f"more than {MOST_TRIES:,} orders of its products to try", state)
        if isinstance(form, Name):
            return self._match_name(form, key, state)
        if isinstance(form, Combine):
            return self._match_combine(form, key, state, pattern)
        kind = pattern.roles.get(form.name, "operation")
        if kind == "linear":
            found = self._match_linear(form, key, state)
            linear = self.graph.linear(found)
            assert linear is not None
            return self._match(form.arguments[0], self.graph.operands(found)[0], state, pattern)
        if kind == "operation":
            found = self._match_operation(form, key, state)
            for argument, operand in zip(form.arguments, self.graph.operands(found), strict=False):
                state = self._match(argument, operand, state, pattern)
            return state
        inner = form.arguments[0]
        if kind == "elementwise":
            source = self._elementwise_source(form, key, state)
        elif isinstance(inner, Combine) or (isinstance(inner, Apply) and inner.name in OPERATIONS):
            return self._match_behind_chain(form, inner, key, state, pattern)
        else:
            source = self._chain_source(form, key, state)
            if isinstance(inner, Apply):
                state.values[inner.name] = key
        state.matched += 1
        return self._match(inner, source, state, pattern)

    def _match_name(self, form: Name, key: str, state: _State) -> _State:
        if form.name == "_":
            return state
        value = self.through_moves(key)
        if state.variables.setdefault(form.name, value) != value:
            raise _Stopped(key, f"the same `{form.name}` as before", self._describe(value), state)
        return state

    def _match_linear(self, form: Apply, key: str, state: _State) -> str:
        found = self.through_moves(key)
        if self.graph.linear(found) is None:
            raise _Stopped(found, f"the matrix `{form.name}`", self._describe(found), state)
        if state.linears.setdefault(form.name, found) != found:
            raise _Stopped(found, f"`{self._weight(state.linears[form.name])}` again", self._describe(found), state)
        state.values.setdefault(form.name, key)
        state.matched += 1
        return found

    def _match_operation(self, form: Apply, key: str, state: _State) -> str:
        found = self.through_moves(key)
        if self.graph.operation(found) != form.name:
            raise _Stopped(found, f"`{form.name}`", self._describe(found), state)
        if form.name == "join" and len(self.graph.operands(found)) != len(form.arguments):
            parts = f"{len(self.graph.operands(found))} parts side by side"
            raise _Stopped(found, f"{len(form.arguments)} of them", parts, state)
        if form.name == "join" and len(sources := self._sources(found)) < len(form.arguments):
            only = ", ".join(f"`{self._weight(source)}`" for source in sources) or "none"
            raise _Stopped(found, "parts from different matrices", f"one matrix behind all of them ({only})", state)
        state.operations[form.name] = found
        state.matched += 1
        return found

    def _match_combine(self, form: Combine, key: str, state: _State, pattern: Pattern) -> _State:
        wanted = "mul" if form.operator == "*" else "add"
        found = self._through_scaling(self.through_moves(key))
        parts = self._flatten(found, wanted)
        if len(parts) != len(form.parts) or len(parts) > LARGEST_PRODUCT:
            word = "product" if wanted == "mul" else "sum"
            what = self._describe(found)
            if len(parts) > 1:
                what, state.matched = f"a {word} of {len(parts)}", state.matched + 1
            raise _Stopped(found, f"a {word} of {len(form.parts)}", what, state)
        best: _Stopped | None = None
        # What bends its value most is tried first in the first place: of two that both could be it, the activation.
        for order in permutations(sorted(parts, key=self._bends, reverse=True)):
            attempt = state.copy()
            attempt.matched += 1
            try:
                for part, operand in zip(form.parts, order, strict=True):
                    attempt = self._match(part, operand, attempt, pattern)
                return attempt
            except _Stopped as stop:
                if best is None or stop.state.matched > best.state.matched:
                    best = stop
        assert best is not None
        raise best

    def _flatten(self, key: str, wanted: str) -> list[str]:
        """Factors of a product (or parts of a sum) with more than one source."""
        carrying = self._carrying(key)
        if self.graph.operation(key) != wanted or len(carrying) < 2 or self._root(key) != key:
            return [key]
        return [part for operand in carrying for part in self._flatten(operand, wanted)]

    def _elementwise_source(self, form: Apply, key: str, state: _State) -> str:
        key = self.through_moves(key)
        source = self._root(key)
        if source == key or not self._bends(key):
            raise _Stopped(key, f"an element-wise function (`{form.name}`)", self._describe(key), state)
        return source

    def _bends(self, key: str) -> int:
        """How many operations between a value and its element-wise source are more than a scale: a shift is, too."""
        key = self.through_moves(key)
        queue, seen, count = [key], {self._root(key)}, 0
        while queue:
            node = queue.pop()
            if node not in seen:
                seen.add(node)
                count += self.graph.effect(node) in (Effect.UNARY, Effect.SUM) or self._meets_itself(node)
                queue += [operand for operand in self.graph.operands(node) if self.graph.carries(operand)]
        return count

    def _meets_itself(self, key: str) -> bool:
        carrying = self._carrying(key)
        is_product = self.graph.effect(key) is Effect.PRODUCT
        return is_product and (len(carrying) > 1 or self.graph.operation(key) not in ("mul", "div"))

    def _chain_source(self, form: Apply, key: str, state: _State) -> str:
        """The one product with a matrix that everything in `key` comes from, with no attention in between."""
        sources = self._sources(key)
        attention = next((node for node in self._behind(key) if self.graph.operation(node) in ("scores", "mix")), None)
        if attention is not None:
            raise _Stopped(attention, f"no attention behind `{form.name}`", self._describe(attention), state)
        if not state.operations and (added := self._added(key)) is not None:
            raise _Stopped(added, f"nothing but one matrix behind `{form.name}`", "a sum with other values", state)
        if len(sources) != 1:
            names = ", ".join(f"`{self._weight(source)}`" for source in sources) or "none"
            advice = ", added up: merge them into one first" if self.graph.operation(key) == "add" else ""
            raise _Stopped(key, f"one matrix behind `{form.name}`", f"{len(sources)} ({names}){advice}", state)
        return sources[0]

    def _added(self, key: str) -> str | None:
        """A sum behind `key` with a value that comes from the model's inputs through no matrix: a residual stream."""
        for node in [key, *self._behind(key)]:
            operands = self.graph.operands(node)
            if self.graph.effect(node) is Effect.SUM and any(self._comes_from_inputs(other) for other in operands):
                return node
        return None

    def _comes_from_inputs(self, key: str) -> bool:
        if self.graph.carries(key):
            return False
        queue, seen = [key], set()
        while queue:
            node = queue.pop()
            if node not in seen:
                seen.add(node)
                queue += self.graph.operands(node)
        return any(self.graph.traced(node).name in self.graph.trace.inputs for node in seen)

    def _sources(self, key: str) -> list[str]:
        """The nearest products with matrices that `key` comes from."""
        sources: dict[str, None] = {}
        queue, seen = [key], set()
        while queue:
            node = queue.pop()
            if node in seen or not self.graph.carries(node):
                continue
            seen.add(node)
            if self.graph.linear(node) is not None:
                sources[node] = None
            else:
                queue += self.graph.operands(node)
        return list(sources)

    def _match_behind_chain(
        self, form: Apply, inner: Combine | Apply, key: str, state: _State, pattern: Pattern
    ) -> _State:
        """Match `inner` at the nearest value that everything in `key` comes from."""
        best = _Stopped(key, f"`{inner}` behind `{form.name}`", self._describe(self.through_moves(key)), state)
        wanted = inner.name if isinstance(inner, Apply) else "mul" if inner.operator == "*" else "add"
        for node in self._behind(key):
            if self.graph.operation(node) == wanted and self._source_of_all(key, node):
                attempt = state.copy()
                attempt.matched += 1
                try:
                    return self._match(inner, node, attempt, pattern)
                except _Stopped as stop:
                    if stop.state.matched > best.state.matched + 1:
                        best = stop
        raise best

    def _behind(self, key: str) -> list[str]:
        """What a value is computed from, back to products with matrices, the nearest first."""
        found, queue = {key}, [key]
        for node in queue:
            for operand in self.graph.operands(node):
                if self.graph.linear(operand) is None and self.graph.carries(operand) and operand not in found:
                    found.add(operand)
                    queue.append(operand)
            if len(found) > MOST_IN_A_CHAIN:
                break
        return queue[1:]

    def _source_of_all(self, key: str, source: str) -> bool:
        """Whether every way from `key` back to a matrix passes `source`, and some operation stands between."""
        queue, seen, steps = [key], {source}, 0
        while queue:
            node = queue.pop()
            if node in seen or not self.graph.carries(node):
                continue
            if self.graph.linear(node) is not None:
                return False
            seen.add(node)
            steps += self.graph.effect(node) is not Effect.MOVE
            queue += self.graph.operands(node)
        return steps > 0

    def _weight(self, key: str) -> str:
        linear = self.graph.linear(key)
        return linear.weight if linear else key

    def _find_root(self, key: str) -> str:
        """The value that `key` is an element-wise function of; itself where it is none."""
        if self.graph.effect(key) not in ELEMENTWISE:
            return key
        roots = {self._root(operand) for operand in self.graph.operands(key) if self.graph.carries(operand)}
        return roots.pop() if len(roots) == 1 else key

    def through_moves(self, key: str) -> str:
        """The value that data movement brought here."""
        while self.graph.effect(key) is Effect.MOVE:
            carrying = self._carrying(key)
            if len(carrying) != 1 and key not in self._parts:
                break
            key = carrying[self._parts.get(key, 0)]
        return key

    def _through_scaling(self, key: str) -> str:
        while self.graph.operation(key) in ("mul", "div"):
            carrying = self._carrying(key)
            if len(carrying) != 1:
                break
            key = self.through_moves(carrying[0])
        return key

    def _describe(self, key: str) -> str:
        linear = self.graph.linear(key)
        if linear is not None:
            return f"the matrix `{linear.weight}`"
        operation = self.graph.operation(key)
        if operation == "placeholder":
            return "an input of the model"
        unknown = ", whose effect is not known" if self.graph.effect(key) is Effect.UNKNOWN else ""
        return f"`{operation}`{unknown}"
