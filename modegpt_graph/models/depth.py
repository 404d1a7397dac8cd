"""A configuration of the same model with fewer layers."""

import copy
from collections.abc import Sequence
from typing import Any

DEPTH_NAMES = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers")
# Per-layer lists are told by their length; these are per model, whatever their length.
LISTS_PER_MODEL = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id")


def shallow(config: Any, max_layers: int) -> Any:
    """A copy of `config` with at most `max_layers` layers, whatever it says layer by layer cut to match.

    A list is per-layer when it is as long as the model is deep, a mapping when its keys are layer indices. Of layers
    that differ in those lists, the first of each kind is kept, so that a model of two layers still has, say, a sliding
    one and a full one. Raises what the configuration's own class raises where the figures no longer fit each other.
    """
    text = config.get_text_config(decoder=True)
    holder = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    if holder is None:
        # Old encoder-decoder configurations hand out an altered copy of themselves: those are cut as a whole.
        text = config
    layers = text.num_hidden_layers
    if layers <= max_layers:
        return copy.deepcopy(config)
    cut = type(text).from_dict(_cut(text, layers, max_layers))
    if holder is None:
        return cut
    whole = copy.deepcopy(config)
    setattr(whole, holder, cut)
    return whole


def _cut(config: Any, layers: int, max_layers: int) -> dict[str, Any]:
    stored: dict[str, Any] = config.to_dict()
    per_layer = [
        key
        for key, value in stored.items()
        if isinstance(value, (list, tuple)) and len(value) == layers and key not in LISTS_PER_MODEL
    ]
    kept = _one_of_each_kind([stored[key] for key in per_layer], layers, max_layers)
    for key in per_layer:
        stored[key] = [stored[key][index] for index in kept]
    mapped = config.attribute_map.get("num_hidden_layers")
    for key, value in stored.items():
        if key in DEPTH_NAMES or key == mapped:
            stored[key] = min(value, max_layers) if isinstance(value, int) else value
        elif isinstance(value, dict) and value and all(str(name).isdigit() for name in value):
            by_index = {int(name): entry for name, entry in value.items()}
            stored[key] = {place: by_index[index] for place, index in enumerate(kept) if index in by_index}
    return stored


def _one_of_each_kind(lists: Sequence[Sequence[Any]], layers: int, max_layers: int) -> list[int]:
    """Indices of `max_layers` layers, ascending: the first of each kind, then the first of the rest."""
    kinds = [repr([entries[layer] for entries in lists]) for layer in range(layers)]
    firsts = [layer for layer in range(layers) if kinds[layer] not in kinds[:layer]]
    rest = [layer for layer in range(layers) if layer not in firsts]
    return sorted((firsts + rest)[:max_layers])
