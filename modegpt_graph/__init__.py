"""Compress any decoder language model by modular decomposition, found and certified on its graph.

import modegpt_graph as mg

report = mg.analyze("demo")
result = mg.compress("demo", ratio=0.3, calibration="self")
result.save("small")
model = mg.load("small")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modegpt_graph.api import Proof, Report, Result, analyze, compress, load, verify

__all__ = ["Proof", "Report", "Result", "analyze", "compress", "load", "verify"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: they are read when the first function is asked for.
    if name in __all__:
        from modegpt_graph import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
