import pytest
import torch
from torch import nn

from modegpt_graph.errors import InputError
from modegpt_graph.evaluate import compare_throughput, random_prompt, tokens_per_second


class Counting:
    """Notes the shape of the token ids of every forward pass of a model."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(
            lambda _module, args, _kwargs: self.shapes.append(args[0].shape), with_kwargs=True
        )


def test_prompt_is_read_once_and_tokens_are_written_one_by_one_with_the_cache(tiny):
    model = tiny()
    counted = Counting(model)
    speed = tokens_per_second(model, random_prompt(97, batch=2, length=10), new_tokens=3)
    assert [tuple(shape) for shape in counted.shapes] == [(2, 10), (2, 1), (2, 1), (2, 1)]
    assert speed.prefill > 0
    assert speed.decode > 0


def test_models_take_turns_and_change_who_goes_first(tiny):
    dense, compressed = tiny(), tiny()
    order = []
    dense.register_forward_pre_hook(lambda *_: order.append("dense"))
    compressed.register_forward_pre_hook(lambda *_: order.append("compressed"))
    comparison = compare_throughput(dense, compressed, random_prompt(97, length=4), new_tokens=1, rounds=2)
    # Two passes a turn: the prompt and one token. The first turn of each warms up.
    assert order[::2] == ["dense", "compressed", "dense", "compressed", "compressed", "dense"]
    assert comparison.prefill_ratio > 0
    assert comparison.decode_ratio > 0


def test_a_module_without_a_cache_has_no_speed():
    with pytest.raises(InputError, match="one has none"):
        tokens_per_second(nn.Embedding(5, 5), torch.zeros(1, 2, dtype=torch.int64), 1)


def test_prompts_follow_their_seed():
    assert torch.equal(random_prompt(97, seed=1), random_prompt(97, seed=1))
    assert not torch.equal(random_prompt(97, seed=1), random_prompt(97, seed=2))
