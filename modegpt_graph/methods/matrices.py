"""The decoder layers' matrices: what every ratio is of, and the modules that do nothing but multiply by one."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt_graph.match.decoder import decoder_matrices
from modegpt_graph.match.unmatched import is_multiplied
from modegpt_graph.methods.common import Setting, Unavailable
from modegpt_graph.trace.export import Trace
from modegpt_graph.trace.graph import normalise

PROBE_TOLERANCE = 1e-3  # of the largest output: a module that does anything else is off by about 1


@dataclass(frozen=True)
class MatrixModule:
    """A module x W (+ b) of a decoder layer.

    weight, bias: names in the model.   path: of the module.   transposed: the parameter is stored (in, out).
    source: what it reads, in the traced graph: matrices with one source read the same values.
    """

    weight: str
    bias: str | None
    path: str
    layer: int
    transposed: bool
    source: str

    def matrix(self, model: nn.Module) -> Tensor:
        """(out, in)."""
        weight = model.get_parameter(self.weight).detach()
        return weight.T if self.transposed else weight

    def offset(self, model: nn.Module) -> Tensor | None:
        """(out,) the bias, None where there is none."""
        return None if self.bias is None else model.get_parameter(self.bias).detach()


def matrix_sizes(trace: Trace) -> dict[str, int]:
    """Decoder-layer matrix → its parameters, in model order; their sum is `decoder_linear_parameters`."""
    graph = normalise(trace)
    names = [name for name in decoder_matrices(trace) if is_multiplied(graph, name)]
    return {name: trace.module.get_parameter(name).numel() for name in names}


def matrix_modules(setting: Setting) -> tuple[MatrixModule, ...]:
    """The decoder layers' matrices that are modules of their own: each can be replaced by another module.

    That a module does nothing else is tried on random inputs. Raises Unavailable where there is none.
    """
    trace = setting.surveyed.trace
    graph, found = normalise(trace), []
    for name, layer in decoder_matrices(trace).items():
        for key in graph.linears.get(name, ())[:1]:
            linear = graph.linear(key)
            assert linear is not None
            path = name.rpartition(".")[0]
            one = MatrixModule(name, linear.bias, path, layer, linear.transposed, graph.operands(key)[0])
            if _is_plain(setting.dense, one):
                found.append(one)
    if not found:
        raise Unavailable("no matrix of the decoder layers is a module of its own that another could replace")
    return tuple(found)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An `nn.Linear` with these values. weight: (out, in).   bias: (out,)."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _is_plain(model: nn.Module, one: MatrixModule) -> bool:
    owner = model.get_submodule(one.path)
    names = {f"{one.path}.{name}" for name, _ in owner.named_parameters()}
    if names != {one.weight, one.bias} - {None}:
        return False
    weight, bias = one.matrix(model), one.offset(model)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight)
    expected = probe @ weight.T if bias is None else probe @ weight.T + bias
    try:
        with torch.no_grad():
            result = owner(probe)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it wants something else than one tensor
    if not isinstance(result, Tensor) or result.shape != expected.shape:
        return False
    return bool((result - expected).abs().max() <= PROBE_TOLERANCE * expected.abs().max().clamp_min(1e-30))
