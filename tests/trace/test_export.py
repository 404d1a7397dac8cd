from typing import Any

import pytest
import torch
from fixtures import asserting
from fixtures.library import build
from torch import Tensor, nn

from modegpt_graph.trace.calls import record_calls
from modegpt_graph.trace.export import TraceError, export, whole_model_call
from modegpt_graph.trace.operations import Effect, effect, operation


def traced(module: nn.Module, device: str = "meta") -> Any:
    return export(module.to(device).eval(), whole_model_call(torch.zeros(2, 5, dtype=torch.long, device=device)))


class Indexing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)[..., [-2, 0]]


class Writing(Indexing):
    def forward(self, ids: Tensor) -> Tensor:
        values = self.embedding(ids)
        out = values.new_empty(values.shape)
        out[..., :3] = values[..., 3:]
        out[..., 3:] = values[..., :3]
        return out


class Deciding(Indexing):
    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) if int(ids.sum()) > 3 else self.embedding(ids + 1)


def test_what_a_module_asserts_of_values_is_no_branch() -> None:
    assert any(operation(node) == "embedding" for node in traced(asserting.Asserting()).graph.nodes)


def test_a_constant_keeps_its_value_on_the_meta_device() -> None:
    constants = list(traced(Indexing()).constants.values())
    assert [constant.tolist() for constant in constants] == [[-2, 0]]


def test_a_module_is_left_as_it_was() -> None:
    module = Indexing().to("meta")
    before = module.embedding.weight
    traced(module)
    assert module.embedding.weight is before
    assert before.device.type == "meta"


def test_writes_into_operands_become_values() -> None:
    """In the graph everything that the result depends on can be reached from it."""
    graph = traced(Writing()).graph
    assert not any(operation(node).endswith("copy_") for node in graph.nodes)
    reached, queue = set(), [graph.output_node()]
    while queue:
        node = queue.pop()
        reached.add(node)
        queue += [one for one in node.all_input_nodes if one not in reached]
    assert any(node.name.endswith("embedding_weight") for node in reached)


def test_what_cannot_be_traced_is_said_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError) as raised:
        traced(Deciding())
    assert capfd.readouterr() == ("", "")  # torch would show all the graph that it had got
    assert str(raised.value).startswith("Deciding: torch.export stopped: ")
    assert "\n" not in str(raised.value)


def test_a_shared_matrix_has_one_name() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 6)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.second(self.first(self.embedding(ids)))

    with torch.device("meta"):  # moving a module there would part the two
        shared = Shared()
    names = set(traced(shared).state.values())
    assert names == {"embedding.weight", "first.weight", "first.bias", "second.bias"}


def test_calls_tell_the_axes_that_follow_batch_and_tokens() -> None:
    name = "model.layers.1.self_attn"
    call = record_calls(build("llama"), [name])[name]
    assert call.has_cache
    index = next(index for path, index in call.inputs() if path == ("hidden_states",))
    assert call.dynamic[index] == (0, 1)
    assert call.length is not None
    mask, axis = call.length
    assert call.tensors[mask].shape[axis] == 9  # four tokens in the cache, five new ones


def test_a_module_that_is_never_called_is_named() -> None:
    model: Any = build("llama")
    model.spare = nn.Linear(2, 2)
    assert not record_calls(model, ["spare"])


def test_an_operation_that_is_not_in_the_table_is_unknown() -> None:
    class Odd(Indexing):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.embedding(ids)).sinc_().clamp_(0)

    effects = {operation(node): effect(node) for node in traced(Odd()).graph.nodes if node.op == "call_function"}
    assert effects["special_bessel_j0"] is Effect.UNKNOWN
    assert effects["clamp_"] is Effect.UNARY
