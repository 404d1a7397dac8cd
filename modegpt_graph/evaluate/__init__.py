"""What a model is worth: perplexity, divergence from the dense model, speed."""

from modegpt_graph.evaluate.divergence import Divergence, compare, kl_divergence
from modegpt_graph.evaluate.perplexity import perplexity
from modegpt_graph.evaluate.throughput import (
    Throughput,
    ThroughputComparison,
    check_decodes,
    compare_throughput,
    random_prompt,
    tokens_per_second,
)

__all__ = [
    "Divergence",
    "Throughput",
    "ThroughputComparison",
    "check_decodes",
    "compare",
    "compare_throughput",
    "kl_divergence",
    "perplexity",
    "random_prompt",
    "tokens_per_second",
]
