#!/usr/bin/env python
"""Fail where the package's code names an architecture or one of its modules.

The package finds matrices by data flow; a name in its code would be a branch on an architecture. What is checked:
identifiers and strings in `modegpt_graph/**/*.py`. What is not: comments and docstrings, which cannot branch.
Words of everyday English or mathematics that are model types too (phi, bloom, opt …) count only as a whole string.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "modegpt_graph"
MODULE_NAMES = frozenset(
    """
    q_proj k_proj v_proj o_proj out_proj qkv_proj gate_proj up_proj down_proj gate_up_proj in_proj fc1 fc2 fc_in fc_out
    c_attn c_proj c_fc c_attn_v query_key_value dense_h_to_4h dense_4h_to_h wqkv wq wk wv wo w1 w2 w3 self_attn
    self_attention attn_qkv kv_a_proj_with_mqa kv_b_proj q_a_proj q_b_proj block_sparse_moe input_layernorm
    post_attention_layernorm embed_tokens embed_positions final_layernorm ln_1 ln_2 ln_f wte wpe lm_head embed_out
    rotary_emb q_norm k_norm q_layernorm k_layernorm
    """.split()
)
# Model types that are also words: an identifier or a sentence may hold them, a string that is nothing else may not.
WORDS = frozenset(
    """
    beam bloom codegen ctrl electra falcon flint git granite helium laguna mvp opt pegasus persimmon phi
    reformer whisper
    """.split()
)


def model_names() -> tuple[frozenset[str], re.Pattern[str]]:
    """Model types of the transformers library's causal language models, and what its classes' names look like."""
    from transformers.models.auto import configuration_auto, modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    configurations: dict[str, str] = vars(configuration_auto)["CONFIG_MAPPING_NAMES"]
    types = frozenset(str(name).lower().replace("-", "_") for name in causal)
    prefixes = {configurations[name].removesuffix("Config") for name in causal if name in configurations}
    longest_first = sorted(map(re.escape, prefixes), key=len, reverse=True)
    return types, re.compile(rf"({'|'.join(longest_first)})[A-Z]\w*")


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and every string of a file that is no docstring."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield line, node.value
        for field in ("id", "attr", "arg", "name", "module"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield line, text


def whole_words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, word) of every string that is one of WORDS and nothing else: it can only be there to be compared."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip().lower() in WORDS:
            yield node.lineno, node.value.strip().lower()


def names_in(text: str, types: frozenset[str], classes: re.Pattern[str]) -> Iterator[str]:
    """The forbidden names that `text` holds as whole words; of a model type, as part of an identifier too."""
    for word in re.findall(r"\w+", text.replace("-", "_")):
        lowered = word.lower()
        is_type = any(part in types - WORDS for part in (lowered, *lowered.split("_")))
        if is_type or lowered in MODULE_NAMES or classes.fullmatch(word):
            yield word


def check(package: Path) -> list[str]:
    """`file:line: name` for each forbidden name in the package's code."""
    types, classes = model_names()
    found = []
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        found += [
            (str(file.relative_to(package.parent)), line, text) for line, text in whole_words(tree) if text in types
        ]
        for line, text in texts(tree):
            for name in names_in(text, types, classes):
                found.append((str(file.relative_to(package.parent)), line, name))
    return [f"{file}:{line}: names {name!r}" for file, line, name in sorted(found)]


def main() -> int:
    found = check(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE)
    print("\n".join(found) if found else "no architecture or module name in the code")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
