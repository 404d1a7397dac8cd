"""The methods by name, with what they do and where they come from. Nothing heavy is imported to know them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """summary: what is done, in a few words.   source: where it is published."""

    summary: str
    source: str


METHODS: Mapping[str, Reference] = {
    "ours": Reference("modular decomposition, refitted, ranks by measured curves", "what `compress` does"),
    "paper": Reference("the paper's algorithms 1 to 3, ranks by block influence", "arXiv 2408.09632"),
    "uniform": Reference("channels and heads dropped at random, alike in every layer", "arXiv 2003.03033"),
    "magnitude": Reference("channels and heads with the smallest weights dropped", "arXiv 1608.08710"),
    "wanda-structured": Reference(
        "channels and heads with the smallest weight times input dropped", "arXiv 2306.11695"
    ),
    "flap": Reference("channels and heads that fluctuate least replaced by biases", "arXiv 2312.11983"),
    "svd": Reference("every matrix replaced by its truncated SVD", "arXiv 1404.0736"),
    "asvd": Reference("truncated SVD of matrices scaled by their inputs", "arXiv 2312.05821"),
    "svd-llm": Reference("truncated SVD of whitened matrices", "arXiv 2403.07378"),
    "slicegpt": Reference("residual stream rotated to its principal components and sliced", "arXiv 2401.15024"),
    "shortgpt": Reference("layers with the least block influence dropped", "arXiv 2403.03853"),
    "sleb": Reference("layers dropped one by one, each time the least missed", "arXiv 2402.09025"),
}
