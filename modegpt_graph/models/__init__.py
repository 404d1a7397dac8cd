"""Where a model comes from: hub, folder, gguf file, public configuration, factory, demo, or a module in memory."""

from modegpt_graph.models.forward import (
    accepts_use_cache,
    cache_keyword,
    cache_of,
    can_generate,
    device_of,
    forward_logits,
    is_cache,
    logits_of,
    overflow_advice,
    positions_of,
    vocabulary_of,
)
from modegpt_graph.models.hub import HubUnreachable, hub_is_reachable
from modegpt_graph.models.resolve import architecture_names, resolve
from modegpt_graph.models.source import ModelSource

__all__ = [
    "HubUnreachable",
    "ModelSource",
    "accepts_use_cache",
    "architecture_names",
    "cache_keyword",
    "cache_of",
    "can_generate",
    "device_of",
    "forward_logits",
    "hub_is_reachable",
    "is_cache",
    "logits_of",
    "overflow_advice",
    "positions_of",
    "resolve",
    "vocabulary_of",
]
