"""Which function is which method. The names, their summaries and sources are in `names`."""

from collections.abc import Callable, Mapping

from modegpt_graph.methods import layers, low_rank, modular, slicegpt, structured
from modegpt_graph.methods.common import Pass, Setting

PASSES: Mapping[str, Callable[[Setting], Pass]] = {
    "ours": modular.ours,
    "paper": modular.paper,
    "uniform": structured.uniform,
    "magnitude": structured.magnitude,
    "wanda-structured": structured.wanda,
    "flap": structured.flap,
    "svd": low_rank.svd,
    "asvd": low_rank.asvd,
    "svd-llm": low_rank.svd_llm,
    "slicegpt": slicegpt.slicegpt,
    "shortgpt": layers.shortgpt,
    "sleb": layers.sleb,
}
