"""Ways to decompose a model by name: which algorithms, with which figures, and how the ratio is spread."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from modegpt_graph.calibrate.statistics import Statistics
from modegpt_graph.errors import InputError
from modegpt_graph.match.modules import Placed
from modegpt_graph.rewrite.paper import paper_solver
from modegpt_graph.rewrite.problem import Solver
from modegpt_graph.rewrite.solve import Recipe, solver


@dataclass(frozen=True)
class Preset:
    """recipe, solver: how sites are decomposed.   allocator: how the ratio is spread unless another is asked for.

    value_inputs: whether calibration also collects what value projections read.
    weighs_tokens: whether tokens count as a norm that follows a consumer scales what that puts out.
    tries_selections: whether the surgeon chooses features where it does less to the logits than the recipe's leverage.
    recalibrates: whether consumers, and producers that scale, are fitted again, layer by layer, in the smaller model.
    other_share: tokens of general text to calibrate on beside, for each of the calibration text. One kind of text
    shows few of a model's features at work; what is fitted to it alone is lost on others.
    """

    recipe: Recipe
    allocator: str
    solver: Callable[[Placed, nn.Module, Statistics, Recipe], Solver] = solver
    value_inputs: bool = False
    weighs_tokens: bool = False
    tries_selections: bool = False
    recalibrates: bool = False
    other_share: float = 0.0

    @property
    def how(self) -> str:
        """The algorithms in words that tell them apart."""
        return f"{self.recipe} {self.solver.__name__}"


PRESETS: Mapping[str, Preset] = {
    "default": Preset(
        Recipe(), "curves", weighs_tokens=True, tries_selections=True, recalibrates=True, other_share=0.5
    ),
    # The paper leaves λ open: the mean diagonal of C is the best of those tried. Refits have no ridge; one is added,
    # as small as holds, where Sᵀ C S is singular.
    # Source: MoDeGPT (arXiv 2408.09632), algorithms 1 to 3 and section 3.3.
    "paper": Preset(
        Recipe(selection="leverage", leverage_ridge=1.0, ridge=0.0, score="paper", scale="none"),
        "block-influence",
        paper_solver,
        value_inputs=True,
    ),
}


def preset_named(name: str) -> Preset:
    """Raises InputError for a name that is none."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
