"""Modular decomposition: what `compress` does, and the paper to the letter."""

import copy

from modegpt_graph.allocate.budget import removed_parameters
from modegpt_graph.methods.common import Pass, Setting, Smaller, Unavailable
from modegpt_graph.rewrite.apply import rewrite
from modegpt_graph.rewrite.budget import site_items
from modegpt_graph.rewrite.ranks import curve_ranks, layer_ranks, site_weights
from modegpt_graph.rewrite.solve import Recipe, solver

PAPER = Recipe(selection="leverage", score="paper", scale="none")


def ours(setting: Setting) -> Pass:
    """The default recipe and allocation of `compress`."""
    return _modular(setting, Recipe(), "curves")


def paper(setting: Setting) -> Pass:
    """Ridge leverage scores, norm-product scores and block influence.   Source: MoDeGPT (arXiv 2408.09632)."""
    return _modular(setting, PAPER, "block-influence")


def _modular(setting: Setting, recipe: Recipe, allocator: str) -> Pass:
    dense, modules, observed = setting.dense, setting.modules, setting.observed
    if not modules:
        raise Unavailable("no site can be made smaller; `analyze` says why")
    placed = [(one.path, p) for one in modules for p in one.placed]
    solvers = {}
    with setting.progress.stage("decompose", len(placed)) as stage:
        for path, one in placed:
            statistics = observed.statistics[one.site.id]
            solvers[one.site.id] = solver(one, dense.get_submodule(path), statistics, recipe)
            stage.advance()
    items = site_items(modules)
    weights = {}
    if allocator == "curves":
        weights = site_weights(dense, modules, setting.layers, items, solvers, setting.tokens, setting.progress)

    def at(ratio: float) -> Smaller:
        if allocator == "curves":
            ranks = curve_ranks(items, solvers, weights, setting.total, ratio)
        else:
            ranks = layer_ranks(allocator, items, observed.importance, setting.total, ratio)
        solutions = {
            item.id: solvers[item.id].solution(ranks[item.id]) for item in items if ranks[item.id] < item.full_rank
        }
        smaller = copy.deepcopy(dense)
        rewrite(smaller, modules, solutions)
        return Smaller(smaller, removed_parameters(items, ranks))

    return at
