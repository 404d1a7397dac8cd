"""How many weights of a layer stand out: OWL's score, by weight times input."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.observe import TOKENS_PER_BATCH
from modegpt_graph.match.decoder import decoder_matrices
from modegpt_graph.match.prepare import Surveyed
from modegpt_graph.models import forward_logits
from modegpt_graph.progress import NullProgress, Progress
from modegpt_graph.trace.graph import normalise

MULTIPLE = 5.0  # of the layer's mean, from which on a weight is an outlier: M, of which the paper tries several
WINDOWS = 8  # of the calibration text


@torch.no_grad()
def outlier_shares(model: nn.Module, surveyed: Surveyed, tokens: Tensor, progress: Progress | None = None) -> Tensor:
    """(L,) share of entries of ‖X_j‖₂ · |W_ij| above MULTIPLE times their mean, over all matrices of each layer.

    Matrices that belong to no module of their own, such as those of experts in one tensor, are left out.
    tokens: (windows, window), of which the first WINDOWS are run.   Source: OWL (arXiv 2310.05175), section 3.2.
    """
    graph, layers = normalise(surveyed.trace), decoder_matrices(surveyed.trace)
    products = {name: graph.linear(keys[0]) for name in layers if (keys := graph.linears.get(name))}
    turned = {name: one.transposed for name, one in products.items() if one is not None and one.experts is None}
    norms: dict[str, Tensor] = {}
    windows = tokens[:WINDOWS].split(max(1, TOKENS_PER_BATCH // tokens.shape[1]))
    with _observed(model, turned, norms), (progress or NullProgress()).stage("count outliers", len(windows)) as stage:
        for batch in windows:
            forward_logits(model, batch)
            stage.advance()
    shares = torch.zeros(max(layers.values()) + 1, dtype=torch.float64)
    for layer in range(len(shares)):
        values = [
            _weighed(model.get_parameter(name), norms[name], turned[name])
            for name, at in layers.items()
            if at == layer and name in norms
        ]
        if values:
            limit = MULTIPLE * sum(float(one.sum()) for one in values) / sum(one.numel() for one in values)
            shares[layer] = sum(int((one > limit).sum()) for one in values) / sum(one.numel() for one in values)
    return shares


def _weighed(weight: Tensor, squares: Tensor, turned: bool) -> Tensor:
    """|W| with every input multiplied by its norm. weight: (out, in), or (in, out) where it is turned."""
    norms = squares.sqrt().float()
    return weight.detach().float().abs() * (norms[:, None] if turned else norms)


@contextmanager
def _observed(model: nn.Module, names: Iterable[str], squares: dict[str, Tensor]) -> Iterator[None]:
    """Within this context, Σ x² of what every matrix with a module of its own reads is added to `squares`."""

    def hook(name: str) -> Any:
        def observe(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                found = inputs[0].flatten(0, -2).float().square().sum(0, dtype=torch.float64)
                squares[name] = squares[name] + found if name in squares else found

        return observe

    handles = []
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        if {key for key, _ in owner.named_parameters()} <= {"weight", "bias"}:
            handles.append(owner.register_forward_pre_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
