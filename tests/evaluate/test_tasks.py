"""Accuracy on questions is what counting by hand gives, and does not depend on how rows are batched."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modegpt_graph.errors import InputError
from modegpt_graph.evaluate import tasks as module
from modegpt_graph.evaluate.task_files import read_task
from modegpt_graph.evaluate.tasks import accuracies

WORDS = ["<s>", "sky", "is", "blue", "red", "green", "indeed", "grass"]


class Tokenizer:
    """A word is a token; white space only separates. A text begins with <s>, as with some real ones."""

    bos_token_id, eos_token_id = 0, None

    def __init__(self, begins: bool = True) -> None:
        self.begins = begins

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        lead = [0] if add_special_tokens and self.begins else []
        return {"input_ids": lead + [WORDS.index(word) for word in text.split()]}


class Bigrams(nn.Module):
    """What follows a word depends on that word alone: row i holds the logits after word i."""

    def __init__(self, follows: dict[str, dict[str, float]]) -> None:
        super().__init__()
        chances = torch.full((len(WORDS), len(WORDS)), 1e-6)
        for word, after in follows.items():
            for other, chance in after.items():
                chances[WORDS.index(word), WORDS.index(other)] = chance
        self.embedding = nn.Embedding.from_pretrained(chances.log())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens)


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


MODEL = Bigrams(
    {
        "is": {"blue": 0.5, "red": 0.3, "green": 0.2},
        "blue": {"indeed": 0.2, "sky": 0.8},
        "sky": {"is": 0.9, "grass": 0.1},
        "grass": {"is": 0.2, "green": 0.8},
    }
)
SKY = {"query": "sky is", "choices": ["red", "blue"], "gold": 1}
# p(blue indeed) = 0.5 · 0.2 = 0.1 < p(green) = 0.2; but per character −ln 0.1 / 11 < −ln 0.2 / 5.
LONGER = {"query": "sky is", "choices": ["green", "blue indeed"], "gold": 1}
WRONG = {"query": "grass is", "choices": ["blue", "red"], "gold": 1}


@pytest.mark.parametrize("begins", [True, False])
def test_accuracy_is_counted_by_likelihood_and_by_likelihood_per_character(tmp_path: Path, begins: bool) -> None:
    task = read_task(write(tmp_path / "colours.jsonl", SKY, LONGER, WRONG))
    (found,) = accuracies(MODEL, Tokenizer(begins), [task])
    assert (found.name, found.questions, found.chance) == ("colours", 3, 0.5)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.normalised == pytest.approx(2 / 3)
    assert found.accuracy_error == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))


def test_a_continuation_is_scored_after_each_of_several_contexts(tmp_path: Path) -> None:
    # p(green | grass) = 0.8, p(green | is) = 0.2: what the contexts themselves are worth does not count.
    record = {"context_options": ["sky is", "sky grass"], "continuation": "green", "gold": 1}
    (found,) = accuracies(MODEL, Tokenizer(), [read_task(write(tmp_path / "two.jsonl", record))])
    assert (found.accuracy, found.normalised) == (1.0, 1.0)
    assert found.accuracy_error == math.inf


@pytest.mark.parametrize("budget", [1, 3 * len(WORDS) * 4, 2**25])
def test_likelihoods_are_right_however_rows_are_put_together(
    monkeypatch: pytest.MonkeyPatch, tiny: Any, budget: int
) -> None:
    monkeypatch.setattr(module, "LOGITS_PER_BATCH", budget)
    rows = [module._Row(torch.tensor(ids), start) for ids, start in [([5, 9, 3, 7], 2), ([4, 8], 1), ([1, 2, 3], 1)]]
    model = tiny()
    with torch.no_grad():
        expected = [
            sum(
                float(model(row.tokens[None]).logits[0, at - 1].log_softmax(-1)[row.tokens[at]])
                for at in range(row.start, len(row.tokens))
            )
            for row in rows
        ]
    assert module.log_likelihoods(model, rows).tolist() == pytest.approx(expected, rel=1e-5)


def test_white_space_before_a_continuation_belongs_to_it(tmp_path: Path) -> None:
    records = [
        {"query": "a", "choices": ["b", "c"], "gold": 0},
        {"query": "a\n", "choices": ["b", "c"], "gold": 0},
        {"query": "a", "choices": ["\tb", "c"], "gold": 0},
    ]
    task = read_task(write(tmp_path / "spaces.jsonl", *records))
    assert [question.pairs[0] for question in task.questions] == [("a", " b"), ("a", "\nb"), ("a", "\tb")]


def test_a_context_that_is_too_long_loses_its_beginning(tiny: Any) -> None:
    model = tiny(max_position_embeddings=4)
    row = module._row(Tokenizer(begins=False), ("sky is blue red", " green indeed"), 4)
    assert (row.tokens.tolist(), row.start) == ([3, 4, 5, 6], 2)
    assert module.log_likelihoods(model, [row]).isfinite().all()
    with pytest.raises(InputError, match="longer than the model's 2 positions"):
        module._row(Tokenizer(begins=False), ("sky", " green indeed blue"), 2)


def test_only_the_first_questions_are_read_where_so_many_are_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "colours.jsonl", SKY, LONGER)
    file.write_text(file.read_text(encoding="utf-8") + "this line is never reached", encoding="utf-8")
    assert len(read_task(file, 2).questions) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 1: this is no JSON"),
        ("[1]", "line 1: a line must be a JSON object"),
        ('{"query": "a", "gold": 0}', "line 1: a line must have `query`, `choices` and `gold`, or"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "choices must be a list of two texts or more"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold must be a number from 0 to 1, not 2"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "gold must be a number from 0 to 1, not True"),
        ('{"query": 1, "choices": ["b", "c"], "gold": 0}', "query must be a text"),
        ("", "holds no questions"),
    ],
)
def test_a_file_of_another_shape_is_refused_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(line, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_task(file)
