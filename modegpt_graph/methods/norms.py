"""What a norm module computes, told by running it: kind, scale, shift and ε."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

LARGEST_EPSILON = 1e-2  # with a larger one, what is divided by is hardly the input's size
TOLERANCE = 1e-4  # of the largest output: norms compute in float32 whatever they are given


@dataclass(frozen=True)
class Norm:
    """scale · u / sqrt(mean u² + ε) + shift, with u = x (`rms`) or u = x − mean x (`layer`). scale, shift: (D,)."""

    kind: Literal["rms", "layer"]
    scale: Tensor
    shift: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """What the module returns for x (…, D)."""
        u = _centred(x, self.kind)
        return self.scale * u * (u.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() + self.shift


@torch.no_grad()
def recognise(module: nn.Module, width: int) -> Norm | None:
    """The norm that `module` is, proved on random inputs of three sizes; None where it is none."""
    if any(parameter.ndim > 1 for parameter in module.parameters()):
        return None
    exact = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (1, width), generator=generator).double() * 2 - 1
    probes = torch.randn(4, width, generator=generator, dtype=torch.float64)
    try:
        shift, large, small = (exact(signs * size)[0] for size in (0.0, 1e4, 1e-4))
        answers = [exact(probes * size) for size in (1e-3, 1.0, 30.0)]
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None  # it takes something else than one tensor of this width
    for kind in ("rms", "layer"):
        u = _centred(signs, kind)[0]
        variance = u.square().mean()
        scale = (large - shift) / u * variance.sqrt()
        strongest = (scale * u).abs().argmax()
        root = 1e-4 * (u * scale / (small - shift))[strongest]  # sqrt(1e-8 · variance + ε)
        norm = Norm(kind, scale, shift, max(float(root.square() - 1e-8 * variance), 0.0))
        expected = [norm(probes * size) for size in (1e-3, 1.0, 30.0)]
        if norm.epsilon <= LARGEST_EPSILON and all(
            bool((found - wanted).abs().max() <= TOLERANCE * found.abs().max())
            for found, wanted in zip(answers, expected, strict=True)
        ):
            return norm
    return None


def _centred(x: Tensor, kind: str) -> Tensor:
    return x if kind == "rms" else x - x.mean(-1, keepdim=True)
