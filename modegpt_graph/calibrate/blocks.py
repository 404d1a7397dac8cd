"""Block influence of attention and MLP apart: what each adds to the residual stream, found in the model's graph."""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from modegpt_graph.calibrate.observe import TOKENS_PER_BATCH
from modegpt_graph.match.footprint import Outline
from modegpt_graph.match.prepare import Surveyed
from modegpt_graph.models import forward_logits
from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.trace.graph import Graph
from modegpt_graph.trace.operations import Effect, data_operands, effect, operation

WINDOWS = 8  # of the calibration text: the mean over thousands of tokens needs no more


@dataclass(frozen=True)
class Block:
    """Sites whose outputs are added to the residual stream at one place.

    before, after: modules that read the stream before and after it; None where none does, and nothing is measured.
    """

    sites: tuple[str, ...]
    layer: int | None
    before: str | None
    after: str | None


def blocks_of(surveyed: Surveyed) -> tuple[Block, ...]:
    """The blocks of all sites. A site that adds to no stream is a block of its own.

    The stream is told by what a residual connection is: the first sum after the site with something that the site's own
    input was computed from.
    """
    found: dict[object, Block] = {}
    for located in surveyed.survey.located:
        site, outline = located.site, located.outline
        ends = _residual(outline)
        key: object = site.id if ends is None else ends
        before, after = (None, None) if ends is None else (_reader(outline.graph, end) for end in ends)
        known = found.get(key, Block((), site.layer, before, after))
        found[key] = Block((*known.sites, site.id), known.layer, known.before, known.after)
    return tuple(found.values())


@torch.no_grad()
def block_influence(
    model: nn.Module, blocks: Sequence[Block], tokens: Tensor, progress: Progress | None = None
) -> list[float | None]:
    """1 − E cos(stream before, stream after) of every block, None where it cannot be seen.

    tokens: (windows, window), of which the first WINDOWS are run.   Source: MoDeGPT (arXiv 2408.09632), appendix B.11.
    """
    sums = _Sums(blocks)
    windows = tokens[:WINDOWS].split(max(1, TOKENS_PER_BATCH // tokens.shape[1]))
    with _observed(model, sums), (progress or NullProgress()).stage("score the blocks", len(windows)) as stage:
        for batch in windows:
            sums.start()
            forward_logits(model, batch)
            stage.advance()
    return [1 - total / count if count else None for total, count in zip(sums.totals, sums.counts, strict=True)]


class _Sums:
    """Σ cos and how many tokens, for every block."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = [(block.before, block.after) for block in blocks]
        self.totals, self.counts = [0.0] * len(blocks), [0] * len(blocks)
        self.start()

    def start(self) -> None:
        """Another batch: nothing of it is read yet."""
        self._values: dict[str, Tensor] = {}
        self._read: set[str] = set()
        self._awaited = Counter(before for before, after in self.blocks if before is not None and after is not None)

    def read(self, path: str, value: Tensor) -> None:
        """What a module is called with, the first time in a batch; kept as long as a block awaits its end."""
        if path in self._read:
            return
        self._read.add(path)
        for index, (start, end) in enumerate(self.blocks):
            if start is None or end != path or start not in self._values:
                continue
            before = self._values[start]
            if before.shape == value.shape:
                cosine = torch.nn.functional.cosine_similarity(before.float(), value.float(), dim=-1)
                self.totals[index] += float(cosine.double().sum())
                self.counts[index] += cosine.numel()
            self._awaited[start] -= 1
            if not self._awaited[start]:
                del self._values[start]
        if self._awaited[path]:
            self._values[path] = value


@contextmanager
def _observed(model: nn.Module, sums: _Sums) -> Iterator[None]:
    paths = {path for block in sums.blocks for path in block if path is not None}

    def hook(path: str) -> Any:
        def observe(_: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            given = next((one for one in (*inputs, *keywords.values()) if isinstance(one, Tensor)), None)
            if given is not None:
                sums.read(path, given)

        return observe

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _residual(outline: Outline) -> tuple[fx.Node, fx.Node] | None:
    """The stream before and after a site: an operand of the first sum that rejoins it, and the sum."""
    graph = outline.graph
    source = next(iter(outline.producers.values())).source
    seen = {outline.end}
    queue = [(graph.place(user), user.name, user) for user in outline.end.users if user.op == "call_function"]
    heapq.heapify(queue)
    while queue:
        _, _, node = heapq.heappop(queue)
        if node in seen:
            continue
        seen.add(node)
        operands = data_operands(node)
        if operation(node).removesuffix("_") == "add" and len(operands) == 2:
            others = [one for one in operands if one not in seen]
            if len(others) == 1 and _is_before(graph, _moved(others[0]), source):
                return _moved(others[0]), node
        for user in node.users:
            if user.op == "call_function":
                heapq.heappush(queue, (graph.place(user), user.name, user))
    return None


def _is_before(graph: Graph, node: fx.Node, source: fx.Node) -> bool:
    """Whether `source` was computed from `node`, or is it."""
    first, stack, seen = graph.place(node), [source], set()
    while stack:
        one = stack.pop()
        if one is node:
            return True
        if one not in seen and graph.place(one) >= first:
            seen.add(one)
            stack += one.all_input_nodes
    return False


def _moved(node: fx.Node) -> fx.Node:
    """The value that a node is, laid out anew."""
    while effect(node) in (Effect.SAME, Effect.MOVE) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _reader(graph: Graph, node: fx.Node) -> str | None:
    """The outermost module that is called with a value and is not one that the value is computed in."""
    own, todo = set(_stack(node)), [user for user in node.users if user.op == "call_function"]
    while todo:
        user = min(todo, key=graph.place)
        todo.remove(user)
        path = next((one for one in _stack(user) if one not in own), None)
        if path is not None:
            return path.removeprefix("module").removeprefix(".")
        if effect(user) in (Effect.SAME, Effect.MOVE):
            todo += [one for one in user.users if one.op == "call_function" and one not in todo]
    return None


def _stack(node: fx.Node) -> list[str]:
    """Paths of the modules that a node is computed in, the outermost first."""
    return [where for where, _ in (node.meta.get("nn_module_stack") or {}).values()]
