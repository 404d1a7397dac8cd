"""A compressed model to a folder and back."""

from modegpt_graph.checkpoint.load import is_compressed, load
from modegpt_graph.checkpoint.save import save
from modegpt_graph.checkpoint.size import weights_size

__all__ = ["is_compressed", "load", "save", "weights_size"]
