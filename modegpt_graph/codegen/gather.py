"""How an operand is gathered, as source."""

from collections.abc import Sequence

from modegpt_graph.codegen.layout import atom
from modegpt_graph.flow.shrink import Gather


def gathered(text: str, index: str, gather: Gather, shape: Sequence[int]) -> str:
    """Take elements of an operand of this example shape. text: the operand.   index: the buffer with the positions.

    `take_along_dim` says the general case. With a table that all heads share, as in every layer with rotary embedding,
    it costs a new token as much as a small projection does, and `gather` a third of that.
    """
    own, axis = gather.index.shape, gather.axis
    if len(own) == 1:
        return f"{atom(text)}[..., {index}]" if axis == -1 else f"{atom(text)}.index_select({axis}, {index})"
    missing = len(own) - len(shape)
    if missing > 0:
        return f"torch.take_along_dim({atom(text)}[{'None, ' * missing}...], {index}, dim={axis})"
    if missing < 0 or not text.isidentifier():
        return f"torch.take_along_dim({text}, {index}, dim={axis})"
    others = [place for place in range(len(own)) if place - len(own) != axis]
    wider = ["-1"] * len(own)
    sizes = ["-1"] * len(own)
    for place in others:
        if own[place] == 1:
            sizes[place] = f"{text}.size({place})"
        elif shape[place] == 1:
            wider[place] = f"{index}.size({place})"
    text = f"{text}.expand({', '.join(wider)})" if set(wider) != {"-1"} else text
    return f"{text}.gather({axis}, {index}.expand({', '.join(sizes)}))"
