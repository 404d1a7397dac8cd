"""An `einsum` or `tensordot` is axes put in order and one matrix product, and is said so: it sums over the last axis.

`bqhd,bkhd->bhqk` becomes `q.permute(…) @ k.permute(…)`. Axes that both operands have and that stay are leading axes of
the product; those of one operand alone are broadcast against the other. Several that are summed over are flattened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from modegpt_graph.trace.operations import arguments, operation
from modegpt_graph.trace.spelling import call_like

aten = torch.ops.aten


@dataclass(frozen=True)
class _Term:
    """A value and the letters of its axes."""

    node: fx.Node
    letters: str


def spell_einsums(graph: fx.Graph) -> None:
    """Replace every `einsum` that has such a form by it, and products that broadcast a value over heads' matrices.

    The graph is changed. Left as they are: those that take a diagonal (a letter twice in one operand).
    """
    for node in list(graph.nodes):
        said = _einsum(graph, node)
        if said is not None:
            terms, wanted = _parse(*said)
            if terms is not None:
                with graph.inserting_before(node):
                    result = _Speller(graph, node, wanted).contracted(terms)
                node.replace_all_uses_with(result)
                graph.erase_node(node)


def add_biases_first(graph: fx.Graph) -> None:
    """Where a product has an axis spread over several, and a tensor over these is added, it is added to the product.

    The graph is changed. What is added is then a bias of the product, one value an output.
    """
    for node in list(graph.nodes):
        if operation(node).removesuffix("_") != "add" or node.kwargs or len(node.all_input_nodes) != 2:
            continue
        spread, other = arguments(node)[:2]
        if operation(spread) != "unflatten":
            spread, other = other, spread
        if not isinstance(spread, fx.Node) or not isinstance(other, fx.Node) or operation(spread) != "unflatten":
            continue
        product, axis, sizes = arguments(spread)[:3]
        is_last = axis in (-1, product.meta["val"].ndim - 1)
        if is_last and len(spread.users) == 1 and list(other.meta["val"].shape) == list(sizes):
            with graph.inserting_before(node):
                flat = call_like(graph, node, aten.flatten.using_ints, other)
                added = call_like(graph, node, aten.add.Tensor, product, flat)
                result = call_like(graph, node, aten.unflatten.int, added, -1, sizes)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            graph.erase_node(spread)


def _einsum(graph: fx.Graph, node: fx.Node) -> tuple[str, Sequence[fx.Node]] | None:
    """Equation and operands of a contraction; None for what is none, and for a product of two matrices."""
    if operation(node) == "einsum":
        equation, operands = arguments(node)[:2]
        return equation, operands
    if operation(node) == "tensordot":
        return _tensordot(*arguments(node)[:4])
    if operation(node) == "matmul":
        left, right = arguments(node)[:2]
        sizes = left.meta["val"].shape
        if len(sizes) > 3 and isinstance(sizes[-3], int) and sizes[-3] == 1 and right.meta["val"].ndim == 3:
            with graph.inserting_before(node):
                return "...td,hde->...hte", [call_like(graph, node, aten.squeeze.dim, left, -3), right]
    return None


def _tensordot(left: fx.Node, right: fx.Node, ours: Sequence[int], theirs: Sequence[int]) -> tuple[str, list[fx.Node]]:
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first = [next(letters) for _ in left.meta["val"].shape]
    second = [next(letters) for _ in right.meta["val"].shape]
    for one, other in zip(ours, theirs, strict=True):
        second[other] = first[one]
    summed = {first[axis] for axis in ours}
    free = [letter for letter in [*first, *second] if letter not in summed]
    return f"{''.join(first)},{''.join(second)}->{''.join(free)}", [left, right]


def _parse(equation: str, operands: Sequence[fx.Node]) -> tuple[list[_Term] | None, str]:
    """The operands with one letter an axis, and the letters of the result; None where one has a letter twice."""
    given, arrow, wanted = equation.replace(" ", "").partition("->")
    named = given.split(",")
    free = [chr(number) for number in range(ord("A"), ord("z") + 1) if chr(number).isalpha()]
    free = [letter for letter in free if letter not in equation]
    dots = [
        operand.meta["val"].ndim - len(letters.replace("...", "")) if "..." in letters else 0
        for letters, operand in zip(named, operands, strict=True)
    ]
    longest = "".join(free[: max(dots)])
    named = [
        letters.replace("...", longest[len(longest) - count :]) for letters, count in zip(named, dots, strict=True)
    ]
    if not arrow:
        once = sorted(letter for letter in set("".join(named)) - set(longest) if "".join(named).count(letter) == 1)
        wanted = longest + "".join(once)
    wanted = wanted.replace("...", longest)
    if any(len(set(letters)) != len(letters) for letters in [*named, wanted]):
        return None, wanted
    return [_Term(operand, letters) for operand, letters in zip(operands, named, strict=True)], wanted


class _Speller:
    """Writes the nodes that stand for one `einsum`."""

    def __init__(self, graph: fx.Graph, replaced: fx.Node, wanted: str) -> None:
        self.graph, self.replaced, self.wanted = graph, replaced, wanted

    def contracted(self, terms: Sequence[_Term]) -> fx.Node:
        """The product of all operands, from left to right, its axes in the order of `wanted`."""
        wanted, (done, *rest) = self.wanted, terms
        if not rest:
            return self.ordered(self.summed(done, wanted), wanted)
        for number, term in enumerate(rest):
            later = "".join(other.letters for other in rest[number + 1 :])
            done = self.product(done, term, set(wanted) | set(later))
        return self.ordered(done, wanted)

    def product(self, left: _Term, right: _Term, kept: set[str]) -> _Term:
        """Two operands, summed over the letters that both have and that are not kept."""
        left = self.summed(left, kept | set(right.letters))
        right = self.summed(right, kept | set(left.letters))
        both = set(left.letters) & set(right.letters)
        if both & kept and set(right.letters) - both and self.wanted[-1:] in set(left.letters) - both:
            left, right = right, left  # the last axis of the result is the last of the product, too
        summed = [letter for letter in left.letters if letter in both and letter not in kept]
        batch = [letter for letter in left.letters if letter in both and letter in kept]
        ours = sorted(set(left.letters) - both, key=self.wanted.find)
        theirs = sorted(set(right.letters) - both, key=self.wanted.find)
        if not summed:
            axes = [*batch, *ours, *theirs]
            return _Term(self.call(aten.mul.Tensor, self.aligned(left, axes), self.aligned(right, axes)), "".join(axes))
        if not batch:
            return self.matrix_product(left, right, ours, theirs, summed)
        # Of the letters of one operand alone, the one that the result has last is the product's own axis.
        row, column = ours[-1:], theirs[-1:]
        lead = [*batch, *ours[:-1], *theirs[:-1]]
        first = self.flattened(self.aligned(left, [*lead, *(row or "?"), *summed]), len(summed), last=True)
        second = self.aligned(right, [*lead, *summed, *(column or "?")])
        second = self.flattened(second, len(summed), last=False)
        product = self.call(aten.matmul.default, first, second)
        for axis, letter in ((-1, column), (-2 if column else -1, row)):
            if not letter:
                product = self.call(aten.squeeze.dim, product, axis)
        return _Term(product, "".join([*lead, *row, *column]))

    def matrix_product(self, left: _Term, right: _Term, ours: list[str], theirs: list[str], summed: list[str]) -> _Term:
        """(…, summed) @ (summed, …): one matrix, whose columns are all axes that only the second operand has."""
        first = self.flattened(self.aligned(left, [*(ours or "?"), *summed]), len(summed), last=True)
        second = self.aligned(right, [*summed, *(theirs or "?")])
        sizes = [self.size(right, letter) for letter in theirs]
        if len(theirs) > 1:
            second = self.call(aten.flatten.using_ints, second, len(summed), -1)
        if len(summed) > 1:
            second = self.call(aten.flatten.using_ints, second, 0, len(summed) - 1)
        product = self.call(aten.matmul.default, first, second)
        if len(theirs) > 1:
            product = self.call(aten.unflatten.int, product, -1, sizes)
        for axis, letters in ((-1, theirs), (0, ours)):
            if not letters:
                product = self.call(aten.squeeze.dim, product, axis)
        return _Term(product, "".join([*ours, *theirs]))

    def summed(self, term: _Term, kept: set[str] | str) -> _Term:
        """An operand without the axes that nothing else has and that are not kept."""
        gone = [axis for axis, letter in enumerate(term.letters) if letter not in kept]
        if not gone:
            return term
        letters = "".join(letter for letter in term.letters if letter in kept)
        return _Term(self.call(aten.sum.dim_IntList, term.node, gone), letters)

    def ordered(self, term: _Term, wanted: str) -> fx.Node:
        return self.aligned(term, list(wanted))

    def aligned(self, term: _Term, axes: Sequence[str]) -> fx.Node:
        """An operand with its axes in the order of `axes`; one of size 1 where it has none of that letter."""
        order = [term.letters.index(letter) for letter in axes if letter in term.letters]
        node = term.node
        if order != list(range(len(order))):
            node = self.call(aten.permute.default, node, order)
        for place, letter in enumerate(axes):
            if letter not in term.letters:
                node = self.call(aten.unsqueeze.default, node, place)
        return node

    def flattened(self, node: fx.Node, count: int, last: bool) -> fx.Node:
        """`count` axes as one: the last ones, or those before the last."""
        if count == 1:
            return node
        end = -1 if last else -2
        return self.call(aten.flatten.using_ints, node, end - count + 1, end)

    def size(self, term: _Term, letter: str) -> Any:
        axis = term.letters.index(letter)
        size = term.node.meta["val"].shape[axis]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, term.node, axis)

    def call(self, target: Any, *args: Any) -> fx.Node:
        return call_like(self.graph, self.replaced, target, *args)
