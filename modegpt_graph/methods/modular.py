"""Modular decomposition: what `compress` does, and the paper to the letter."""

from modegpt_graph.methods.common import Pass, Setting, Smaller, Unavailable
from modegpt_graph.rewrite.decomposed import decompose
from modegpt_graph.rewrite.solve import Recipe

PAPER = Recipe(selection="leverage", score="paper", scale="none")


def ours(setting: Setting) -> Pass:
    """The default recipe and allocation of `compress`."""
    return _modular(setting, Recipe(), "curves")


def paper(setting: Setting) -> Pass:
    """Ridge leverage scores, norm-product scores and block influence.   Source: MoDeGPT (arXiv 2408.09632)."""
    return _modular(setting, PAPER, "block-influence")


def _modular(setting: Setting, recipe: Recipe, allocator: str) -> Pass:
    if not setting.modules:
        raise Unavailable("no site can be made smaller; `analyze` says why")
    decomposed = decompose(
        setting.dense,
        setting.modules,
        setting.layers,
        setting.observed,
        setting.tokens,
        setting.total,
        recipe=recipe,
        progress=setting.progress,
    )

    def at(ratio: float) -> Smaller:
        ranks = decomposed.ranks(ratio, allocator)
        smaller, _ = decomposed.model(decomposed.solutions(ranks))
        return Smaller(smaller, decomposed.removed(ranks))

    return at
