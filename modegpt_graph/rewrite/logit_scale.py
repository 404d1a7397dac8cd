"""The norm before the logits, as a means to scale them: found by what a pass shows, fitted to the dense model's.

A norm gives a stream that has lost something the length that all of it had, so a smaller model is surer than it should
be. One number makes up for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modegpt_graph.calibrate.stream import is_near, is_shared, slopes_of
from modegpt_graph.decompose.temperature import best_scale, divergence_slopes
from modegpt_graph.models import forward_logits
from modegpt_graph.rewrite.lockstep import SteppedPass, current_pass

ROWS = 512  # tokens of which the logits are compared
STEP = 0.125


@dataclass(frozen=True)
class LogitScale:
    """path: of a module between the last layer and the logits.   shares: its parameters, and how much is to be added
    to each for its output to grow by all that it is.   stride: of the tokens that go on from there in stepped passes.
    """

    path: str
    shares: Mapping[str, Tensor]
    stride: int

    def thinned(self, output: Tensor) -> Tensor:
        """(…, S / stride, D) of (…, S, D)."""
        return output[..., min(self.stride, output.shape[-2]) // 2 :: self.stride, :]

    @contextmanager
    def hooked(self, model: nn.Module, factors: Sequence[float] = (1.0,)) -> Iterator[None]:
        """Within this context stepped passes have logits of few tokens only: at each factor, one after the other."""

        def thin(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if current_pass() is None:
                return None
            rows = self.thinned(output)
            return torch.cat([factor * rows for factor in factors], dim=-2)

        handle = model.get_submodule(self.path).register_forward_hook(thin)
        try:
            yield
        finally:
            handle.remove()

    def fit(self, smaller: nn.Module, passes: Sequence[tuple[SteppedPass, SteppedPass]]) -> float:
        """Scale the logits of `smaller` as brings them nearest to the dense model's, and return by how much.

        passes: of both models, hooked (the smaller one's at 1 and 1 + STEP), with nothing before them but their end.
        """
        slopes = torch.zeros(())
        for pair in passes:
            for one in pair:
                one.advance()
            wanted, found = (one.result for one in pair)
            logits, further = found.chunk(2, dim=-2)
            slopes = slopes + divergence_slopes(wanted, logits, (further - logits) / STEP)
            for one in pair:
                one.result = None
        scale = best_scale(slopes)
        module = smaller.get_submodule(self.path)
        for name, value in self.scaled(module, scale).items():
            module.get_parameter(name).data = value
        return scale

    def scaled(self, module: nn.Module, scale: float) -> dict[str, Tensor]:
        """The module's parameters, for `scale` times its output."""
        found = {}
        for name, share in self.shares.items():
            own = module.get_parameter(name).detach()
            found[name] = (own.double() + (scale - 1) * share).to(own.dtype)
        return found


def find_logit_scale(
    model: nn.Module, layers: Sequence[str], tokens: Tensor, texts: Sequence[Tensor]
) -> LogitScale | None:
    """The module that reads what the last layer returns, where its parameters scale its output, and logits of a token
    tell of none but its row; None where there is none.

    tokens: (1, S) for two short passes.   texts: that are to be passed.
    """
    readers, logits = _readers_of_the_last_layer(model, layers, tokens)
    if len(readers) != 1:
        return None
    ((path, given, output),) = readers
    module = model.get_submodule(path)
    if any(is_shared(model, one) for one in module.parameters()):
        return None
    stride = max(sum(text.numel() for text in texts) // ROWS, 1)
    found = LogitScale(path, _shares(module, given, output), stride)
    with torch.no_grad():
        twice = functional_call(module, found.scaled(module, 2.0), (given,))
        if not is_near(twice, 2 * output):
            return None
        alone = SteppedPass(lambda: forward_logits(model, tokens))
        with found.hooked(model, (1.0, 1.0)):
            try:
                alone.advance()
            except Exception:  # the model's own: it counts on a row for every token
                return None
        wanted = torch.cat([found.thinned(logits)] * 2, dim=-2)
    return found if alone.result.shape == wanted.shape and is_near(alone.result, wanted) else None


def _readers_of_the_last_layer(
    model: nn.Module, layers: Sequence[str], tokens: Tensor
) -> tuple[list[tuple[str, Tensor, Tensor]], Tensor]:
    """Modules with parameters that are called with the last layer's output: path, what it was given and returned. And
    the logits.
    """
    last: list[Tensor] = []
    seen: list[tuple[str, Tensor, Tensor]] = []

    def leave(_: nn.Module, args: tuple, output: Any) -> None:
        last[:] = [output[0] if isinstance(output, tuple) else output]

    def called(path: str):
        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            if last and args and args[0] is last[0] and isinstance(output, Tensor):
                seen.append((path, args[0], output))

        return hook

    within = tuple(f"{path}." for path in layers)
    handles = [model.get_submodule(layers[-1]).register_forward_hook(leave)]
    for path, module in model.named_modules():
        if path not in layers and not path.startswith(within) and any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(called(path)))
    try:
        with torch.no_grad():
            logits = forward_logits(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


def _shares(module: nn.Module, given: Tensor, output: Tensor) -> dict[str, Tensor]:
    """What to add to each (D,) parameter for all of the output once more, by least squares, column by column."""
    size = output.shape[-1]
    names = [name for name, one in module.named_parameters() if one.shape == (size,)]
    if not names:
        return {}
    with torch.no_grad():
        slopes = torch.stack([slopes_of(module, name, given).flatten(0, -2).double().T for name in names], dim=-1)
    columns = output.double().flatten(0, -2).T[..., None]  # (D, T, 1)
    found = torch.linalg.lstsq(slopes, columns).solution[..., 0]  # (D, parameters)
    return {name: found[:, number] for number, name in enumerate(names)}
