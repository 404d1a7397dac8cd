"""What is said in simpler operations means the same."""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from modegpt_graph.trace.calls import Call
from modegpt_graph.trace.export import Slot, export
from modegpt_graph.trace.operations import operation

EQUATIONS = {
    "bqhd,bkhd->bhqk": ((2, 5, 3, 4), (2, 6, 3, 4)),
    "bkhd,bhqk->bqhd": ((2, 6, 3, 4), (2, 3, 5, 6)),
    "b q g h d, b k g d -> b g h q k": ((2, 5, 3, 2, 4), (2, 6, 3, 4)),
    "bpm,hmd->bphd": ((2, 5, 4), (3, 4, 6)),
    "bqhd,hdm->bqm": ((2, 5, 3, 4), (3, 4, 6)),
    "...d,de": ((2, 5, 4), (4, 6)),
    "bhqk,hn->bnqk": ((2, 3, 5, 6), (3, 3)),
    "i,j->ij": ((4,), (5,)),
    "bd,bd->b": ((3, 4), (3, 4)),
    "ijk->kj": ((2, 3, 4),),
    "tef,efd,te->td": ((5, 3, 4), (3, 4, 6), (5, 3)),
    "tnij,bthnj->bthni": ((5, 2, 2, 2), (2, 5, 3, 2, 2)),
}


class Einsums(nn.Module):
    def forward(self, values: list[Tensor]) -> list[Tensor]:
        rest = iter(values)
        return [torch.einsum(equation, *(next(rest) for _ in shapes)) for equation, shapes in EQUATIONS.items()]


class Gated(nn.Module):
    def forward(self, values: list[Tensor]) -> list[Tensor]:
        first, slopes = values
        twice = torch.sigmoid(first) * torch.sigmoid(first)
        return [functional.glu(first, dim=1), functional.prelu(first, slopes), twice]


class Turns(nn.Module):
    """Two tables written into a new tensor, each at every second place."""

    def forward(self, values: list[Tensor]) -> list[Tensor]:
        out = torch.empty_like(values[0])
        out[..., 0::2] = -values[0][..., 1::2]
        out[..., 1::2] = values[0][..., 0::2]
        return [out]


def spelled(module: nn.Module, values: list[Tensor]) -> tuple[fx.Graph, list[Tensor]]:
    """The traced graph, and what it gives for `values`."""
    slots = [Slot(number) for number in range(len(values))]
    graph = export(module, Call({"values": slots}, (), tuple(values), ((),) * len(values), None, False)).graph
    return graph, list(fx.GraphModule(nn.Module(), graph)(*values))


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def test_every_einsum_is_a_product_of_matrices() -> None:
    values = random(*(shape for shapes in EQUATIONS.values() for shape in shapes))
    graph, found = spelled(Einsums(), values)
    assert not [node for node in graph.nodes if operation(node) == "einsum"]
    for equation, one, expected in zip(EQUATIONS, found, Einsums()(values), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12, msg=equation)


def test_a_diagonal_is_left_to_einsum() -> None:
    class Trace(nn.Module):
        def forward(self, values: list[Tensor]) -> list[Tensor]:
            return [torch.einsum("ii->i", values[0])]

    graph, (found,) = spelled(Trace(), random((3, 3)))
    assert "einsum" in {operation(node) for node in graph.nodes}
    assert torch.equal(found, random((3, 3))[0].diagonal())


def test_gates_are_products_and_what_is_written_twice_is_computed_once() -> None:
    values = random((3, 4, 5), (4,))
    graph, found = spelled(Gated(), values)
    names = [operation(node) for node in graph.nodes]
    assert not {"glu", "prelu"} & set(names)
    assert names.count("sigmoid") == 2  # of the gate, and of the product of two equal ones
    for one, expected in zip(found, Gated()(values), strict=True):
        assert torch.equal(one, expected)


def test_pieces_that_take_turns_are_put_side_by_side() -> None:
    values = random((3, 6))
    graph, (found,) = spelled(Turns(), values)
    names = {operation(node) for node in graph.nodes}
    assert "stack" in names
    assert not {"slice_scatter", "copy"} & names
    assert torch.equal(found, Turns()(values)[0])
