"""The modelling file: what a person reads, and what works where only torch and transformers are installed."""

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from modegpt_graph.checkpoint import load
from modegpt_graph.checkpoint.wrap import wrap
from modegpt_graph.errors import ModegptError

from .alone import given, run_alone
from .conftest import FAMILIES, Compressed, Saved


@pytest.fixture(scope="module")
def alone(saved: Mapping[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    root = tmp_path_factory.mktemp("alone")
    models = {family: {"directory": str(saved[family].directory)} for family in FAMILIES}
    models["placed"] = {"directory": str(saved["llama"].directory), "device_map": "cpu"}
    models["halved"] = {"directory": str(saved["llama"].directory), "dtype": "bfloat16"}
    models["resaved"] = {"directory": str(saved["phi"].directory), "again": str(root / "again")}
    # Reads what the entry before it wrote.
    models["reloaded"] = {"directory": str(root / "again")}
    return run_alone(root, models)


def expected(one: Compressed) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = given().values()
    model = one.model
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return logits, generated


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_without_this_package(
    saved: Mapping[str, Saved], alone: dict[str, torch.Tensor], family: str
) -> None:
    logits, generated = expected(saved[family])
    assert torch.equal(alone[f"{family}/logits"], logits)
    assert torch.equal(alone[f"{family}/generated"], generated)


def test_a_device_map_changes_nothing(alone: dict[str, torch.Tensor]) -> None:
    assert torch.equal(alone["placed/logits"], alone["llama/logits"])


def test_another_dtype_gives_what_the_loaded_model_gives_in_it(
    saved: Mapping[str, Saved], alone: dict[str, torch.Tensor]
) -> None:
    ids, mask = given().values()
    with torch.no_grad():
        logits = load(saved["llama"].directory, dtype=torch.bfloat16)(ids, attention_mask=mask).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(alone["halved/logits"], logits)


def test_what_the_library_saves_again_is_loaded_again(alone: dict[str, torch.Tensor]) -> None:
    assert torch.equal(alone["resaved/logits"], alone["phi/logits"])
    assert torch.equal(alone["reloaded/logits"], alone["phi/logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_reads_well(saved: Mapping[str, Saved], family: str) -> None:
    text = (saved[family].directory / "modeling_compressed.py").read_text()
    assert all(len(line) <= 120 for line in text.splitlines())
    assert all(line == line.rstrip() for line in text.splitlines())
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert type(saved[family].model).__name__ in (ast.get_docstring(tree) or "").splitlines()[0]
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {str(name).partition(".")[0] for name in imported} == {"torch", "transformers"}
    defined = {node.name: node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assert all(ast.get_docstring(node) for name, node in defined.items() if name not in ("forward", "__init__"))


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_one_class_per_topology(saved: Mapping[str, Saved], family: str) -> None:
    one = saved[family]
    tree = ast.parse((one.directory / "modeling_compressed.py").read_text())
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    topologies = {str(rewritten.class_name) for rewritten in one.rewritten if rewritten.forward is not None}
    assert sorted(classes) == sorted([*topologies, f"Compressed{type(one.model).__name__}"])
    assert len({r.forward.source for r in one.rewritten if r.forward is not None}) == len(topologies)


def test_a_class_that_cannot_be_imported_is_refused(small_llama: Compressed, tmp_path: Path) -> None:
    small_llama.model.__class__ = type("Local", (type(small_llama.model),), {"__module__": "__main__"})
    with pytest.raises(ModegptError, match=r"__main__\.Local cannot be imported"):
        small_llama.save(tmp_path / "out")
    assert not any(tmp_path.iterdir())


LINES = [
    "x = call(first_argument, second_argument, [1, 2, 3], key=other(call, with_arguments), **keywords)",
    "def forward(self, hidden_states, position_embeddings=None, attention_mask=None, *, flag='a, b', **kwargs):",
    "    value = (something_quite_long + something_else_that_is_long) * (another_thing - the_last_thing_of_all)",
    "value = table[the_only_index_there_is_in_this_long_line_of_source] + other[:, None, first:last, position]",
    "pair = (the_only_item_of_a_tuple_with_one_item_that_is_long_enough_to_be_broken_up_somewhere,)",
    "text = call('a string (with brackets), and commas, that is long', \"another ] one\", last_argument_of_all)",
    "attention_output_with_no_brackets_at_all = first_operand_of_the_sum_here + second_operand_of_the_sum_here",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("width", [20, 40, 60, 100, 120])
def test_breaking_a_line_keeps_its_meaning(line: str, width: int) -> None:
    body = "\n    pass" if line.startswith("def") else ""
    wrapped = wrap(line, width)
    assert ast.dump(ast.parse(wrapped.strip() + body)) == ast.dump(ast.parse(line.strip() + body))
    assert (wrapped == line) == (len(line) <= width or not set("([") & set(line))


def test_a_call_is_broken_as_a_formatter_would() -> None:
    assert wrap("    output = attention(self, query, key, scaling=0.5)", 44) == (
        "    output = attention(\n        self, query, key, scaling=0.5\n    )"
    )
    assert wrap("output = attention(self, query, key, scaling=0.5)", 26) == (
        "output = attention(\n    self,\n    query,\n    key,\n    scaling=0.5,\n)"
    )
