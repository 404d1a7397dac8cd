import math
import time

import pytest
import torch
from torch import nn

from modegpt_graph.errors import InputError, ModegptError
from modegpt_graph.evaluate import Divergence, compare, kl_divergence, perplexity


class Table(nn.Module):
    """A plain decoder: the logits of what follows each token are a row of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens):
        return self.table[tokens]


@pytest.fixture
def tokens():
    """Two windows, longer than the pieces that the logits are worked through in."""
    return torch.randint(97, (3, 256), generator=torch.Generator().manual_seed(0))


class TestPerplexity:
    def test_of_a_model_that_knows_nothing_is_the_vocabulary(self):
        model = Table(torch.zeros(50, 50))
        assert perplexity(model, torch.randint(50, (2, 700))) == pytest.approx(50, rel=1e-6)

    def test_counts_the_predictions_that_the_protocol_names(self, tiny, tokens):
        model = tiny()
        # The library's own loss is the mean over the same window−1 predictions.
        losses = [model(window[None], labels=window[None]).loss.item() for window in tokens]
        assert perplexity(model, tokens) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)

    def test_does_not_depend_on_the_batch_size(self, tiny, tokens):
        assert perplexity(tiny(), tokens, batch_size=2) == pytest.approx(perplexity(tiny(), tokens), rel=1e-6)

    def test_of_a_model_that_is_certain_and_wrong_is_infinite(self):
        model = Table(torch.eye(4) * 1e6)
        assert perplexity(model, torch.tensor([[0, 1, 0, 1]])) == math.inf

    def test_overflow_is_one_line(self, tokens):
        table = torch.zeros(97, 97)
        table[:, 5] = math.inf
        with pytest.raises(ModegptError, match=r"256 non-finite logits in torch\.float32"):
            perplexity(Table(table), tokens)

    def test_window_longer_than_the_models_positions(self, tiny):
        with pytest.raises(InputError, match="300 tokens is longer than the model's 256 positions; try --window 256"):
            perplexity(tiny(), torch.zeros(1, 300, dtype=torch.int64))

    def test_output_that_is_no_logits(self, tokens):
        with pytest.raises(InputError, match=r"must return \(B, S, V\) logits"):
            perplexity(nn.Flatten(), tokens)


class TestDivergence:
    def test_of_a_model_from_itself_is_nothing(self, tiny, tokens):
        assert kl_divergence(tiny(), tiny(), tokens) == pytest.approx(0, abs=1e-7)

    def test_is_the_formula_over_the_predictions_that_count(self, tiny, tokens):
        dense, compressed = tiny(seed=0), tiny(seed=1)
        expected, found = (model(tokens).logits[:, :-1].double().log_softmax(-1) for model in (dense, compressed))
        formula = (expected.exp() * (expected - found)).sum(-1).mean().item()
        assert formula > 1e-4
        assert kl_divergence(dense, compressed, tokens) == pytest.approx(formula, rel=1e-4)

    def test_has_a_direction(self):
        dense, compressed = Table(torch.tensor([[3.0, 0.0], [3.0, 0.0]])), Table(torch.zeros(2, 2))
        tokens = torch.zeros(1, 5, dtype=torch.int64)
        chance = 1 / (1 + math.exp(-3))
        entropy = -chance * math.log(chance) - (1 - chance) * math.log(1 - chance)
        assert kl_divergence(dense, compressed, tokens) == pytest.approx(math.log(2) - entropy, rel=1e-5)

    def test_gives_both_perplexities_as_each_is_alone(self, tiny, tokens):
        dense, compressed = tiny(seed=0), tiny(seed=1)
        both = compare(dense, compressed, tokens, batch_size=2)
        assert isinstance(both, Divergence)
        assert both.dense_perplexity == pytest.approx(perplexity(dense, tokens), rel=1e-6)
        assert both.perplexity == pytest.approx(perplexity(compressed, tokens), rel=1e-6)
        assert both.perplexity != pytest.approx(both.dense_perplexity, rel=1e-6)

    def test_times_the_dense_model_alone(self, tokens):
        slow, fast = Table(torch.zeros(97, 97)), Table(torch.zeros(97, 97))
        slow.register_forward_pre_hook(lambda *_: time.sleep(0.1))
        assert compare(slow, fast, tokens).dense_seconds >= 0.1 * len(tokens)
        assert compare(fast, slow, tokens).dense_seconds < 0.1 * len(tokens)

    def test_names_the_model_that_overflows(self, tokens):
        fine, broken = Table(torch.zeros(97, 97)), Table(torch.full((97, 97), math.nan))
        with pytest.raises(ModegptError, match="the compressed model gave"):
            compare(fine, broken, tokens)
        with pytest.raises(ModegptError, match="the dense model gave"):
            compare(broken, fine, tokens)

    def test_vocabularies_must_agree(self):
        with pytest.raises(InputError, match="4 and 5 tokens in their vocabularies"):
            compare(Table(torch.zeros(4, 4)), Table(torch.zeros(5, 5)), torch.zeros(1, 3, dtype=torch.int64))
