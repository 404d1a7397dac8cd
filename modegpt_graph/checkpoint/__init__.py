"""A compressed model to a folder and back."""

from modegpt_graph.checkpoint.load import is_compressed, load
from modegpt_graph.checkpoint.save import save

__all__ = ["is_compressed", "load", "save"]
