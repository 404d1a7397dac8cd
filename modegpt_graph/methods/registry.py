"""Which function is which method. The names, their summaries and sources are in `names`."""

from collections.abc import Callable, Mapping

from modegpt_graph.methods import layers, modular, structured
from modegpt_graph.methods.common import Pass, Setting

PASSES: Mapping[str, Callable[[Setting], Pass]] = {
    "ours": modular.ours,
    "paper": modular.paper,
    "uniform": structured.uniform,
    "magnitude": structured.magnitude,
    "wanda-structured": structured.wanda,
    "flap": structured.flap,
    "shortgpt": layers.shortgpt,
}
