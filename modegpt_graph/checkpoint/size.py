"""How many bytes the file of a model's weights will have, without writing it."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.models import can_generate

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def weights_size(model: nn.Module) -> int:
    """Bytes of `model.safetensors` as `save` writes it: length, header, values; tensors that are one are stored once.

    Source: the safetensors format, https://github.com/huggingface/safetensors.
    """
    state: dict[str, Tensor] = model.state_dict()
    metadata, kept = {"format": "pt"}, {}
    for names in _shared(state):
        name = _stored_name(model, names)
        kept[name] = state[name]
        if not can_generate(model):
            metadata |= {other: name for other in names if other != name}
    order = sorted(kept, key=lambda name: (-kept[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        start, end = end, end + kept[name].nbytes
        entry = {"dtype": NAMES.get(kept[name].dtype, "F8_E4M3"), "shape": list(kept[name].shape)}
        header[name] = entry | {"data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def _shared(state: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """Names of tensors, those of one tensor together."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        groups.setdefault(key, []).append(name)
    return groups.values()


def _stored_name(model: Any, names: list[str]) -> str:
    """The one of several names that a tensor is stored under: not one that the library ties to another."""
    tied = getattr(model, "_tied_weights_keys", None) or ()
    own = [name for name in names if not any(re.search(key, name) for key in tied)]
    return sorted(own or names)[0]
