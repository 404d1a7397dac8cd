"""General text that comes with the tool: requests and answers, prose, some code, all written for it.

One kind of text shows few of a model's features at work; what is fitted to it alone is lost on others.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("general.txt")
SEPARATOR = "\n=====\n"
MOST_UNKNOWN = 0.05  # of the tokens; a tokenizer that does not know more of them was made for something else


def general_ids(tokenizer: Any, vocabulary: int) -> Tensor | None:
    """Token ids (N,) of the whole, begun as the tokenizer begins a text; None where it cannot read that.

    vocabulary: of the model, which may have fewer tokens than the tokenizer.
    """
    text = FILE.read_text(encoding="utf-8").replace(SEPARATOR, "\n\n")
    try:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    except Exception:  # a tokenizer is a program of its author's
        return None
    unknown = getattr(tokenizer, "unk_token_id", None)
    missing = 0.0 if unknown is None else float((ids == unknown).double().mean())
    return ids if missing <= MOST_UNKNOWN and int(ids.max()) < vocabulary else None
