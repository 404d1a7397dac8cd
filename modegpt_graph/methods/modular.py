"""Modular decomposition: what `compress` does, and the paper to the letter."""

from collections.abc import Iterable, Mapping
from functools import partial

from modegpt_graph.calibrate.observe import calibrate
from modegpt_graph.calibrate.stream import followed_consumers
from modegpt_graph.methods.common import Pass, Setting, Smaller, Unavailable
from modegpt_graph.rewrite.costs import count_costs
from modegpt_graph.rewrite.decomposed import decompose
from modegpt_graph.rewrite.looseness import observed_beside
from modegpt_graph.rewrite.presets import PRESETS, Preset

METHOD_PRESETS: Mapping[str, str] = {"ours": "default", "paper": "paper"}


def needs_value_inputs(methods: Iterable[str]) -> bool:
    """Whether calibration must collect what value projections read, for one of these methods."""
    return any(PRESETS[METHOD_PRESETS[name]].value_inputs for name in methods if name in METHOD_PRESETS)


def ours(setting: Setting) -> Pass:
    """The default preset of `compress`."""
    return _modular(setting, PRESETS[METHOD_PRESETS["ours"]])


def paper(setting: Setting) -> Pass:
    """The preset of that name.   Source: MoDeGPT (arXiv 2408.09632)."""
    return _modular(setting, PRESETS[METHOD_PRESETS["paper"]])


def _modular(setting: Setting, preset: Preset) -> Pass:
    if not setting.modules:
        raise Unavailable("no site can be made smaller; `analyze` says why")
    text = setting.text.with_other(setting.dense, preset.other_share, setting.seed, setting.progress)
    model = setting.dense, setting.modules, setting.layers
    followed = followed_consumers(*model, text.tokens) if preset.weighs_tokens else {}
    run = partial(calibrate, *model, progress=setting.progress, followed=followed)
    observed = run(text.tokens) if followed else setting.observed
    decomposed = decompose(
        setting.dense,
        setting.surveyed,
        setting.modules,
        setting.layers,
        observed_beside(observed, text.other, setting.modules, run),
        text.parts,
        count_costs(setting.dense, setting.modules, setting.surveyed.trace, setting.total),
        preset=preset,
        progress=setting.progress,
    )

    def at(ratio: float) -> Smaller:
        ranks = decomposed.ranks(ratio, preset.allocator, recalibrates=preset.recalibrates)
        solutions = decomposed.solutions(ranks, recalibrates=preset.recalibrates)
        smaller, _ = decomposed.model(solutions)
        if preset.recalibrates:
            decomposed.recalibrated(smaller, solutions)
        return Smaller(smaller, decomposed.removed(ranks))

    return at
