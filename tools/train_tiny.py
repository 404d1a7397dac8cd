#!/usr/bin/env python3
"""Train tiny decoders of several families to real structure, in minutes each on one core: what random weights hide.

    python tools/train_tiny.py --text valid.txt --text alpaca.json --out trained

makes trained/opt, trained/phi and trained/gpt_neox: safetensors, configuration and a byte-level BPE tokenizer that was
trained on the same texts. A family whose folder is there already is left alone.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modegpt_graph.calibrate.sources import read_text

END = "<|endoftext|>"
VOCABULARY, POSITIONS = 2048, 256
WIDTH, INNER, HEADS, LAYERS = 256, 1024, 4, 4
RATE, WARM_UP, DECAY, CLIP = 3e-3, 0.05, 0.1, 1.0  # of AdamW; warm-up as a share of the steps
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
# model type → its own figures; sizes are alike, dropout is off: a few passes over a small text do not overfit it
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": SIZES | {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "dropout": 0.0},
    "phi": SIZES | {"intermediate_size": INNER, "partial_rotary_factor": 0.5},
    "gpt_neox": SIZES | {"intermediate_size": INNER, "rotary_pct": 0.25},
}


def make_tokenizer(text: str) -> Any:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens, trained on `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=END, eos_token=END, pad_token=END)


def make_model(family: str, seed: int) -> Any:
    """A family's model with the library's own random initialisation."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **FAMILIES[family])
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batches(tokens: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of windows (size, POSITIONS), at random places of `tokens` (N,)."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.arange(POSITIONS)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - POSITIONS, (size, 1), generator=generator)
        yield tokens[starts + inside]


def train(model: Any, tokens: Tensor, *, steps: int, size: int, seed: int) -> float:
    """Next-token training by AdamW with a cosine schedule. Returns the mean loss of the last 20 steps."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    losses, start = [], time.perf_counter()
    model.train()
    for step, batch in enumerate(batches(tokens, size, steps, seed)):
        logits = model(batch, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            recent = sum(losses[-20:]) / 20
            print(f"  step {step + 1:,}: loss {recent:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return sum(losses[-20:]) / len(losses[-20:])


def _rate(done: float) -> float:
    return min(done / WARM_UP, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, action="append", required=True, help="a text file; may be given again")
    parser.add_argument("--out", type=Path, required=True, help="folder for a folder of each family")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {POSITIONS} tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    text = "\n".join(read_text(path) for path in arguments.text)
    tokenizer = make_tokenizer(text)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    print(f"{len(tokens):,} tokens of {VOCABULARY:,} kinds", flush=True)
    for family in arguments.families:
        folder = arguments.out / family
        if folder.exists():
            print(f"{family}: {folder} is there already", flush=True)
            continue
        model = make_model(family, arguments.seed)
        print(f"{family}: {model.num_parameters():,} parameters", flush=True)
        loss = train(model, tokens, steps=arguments.steps, size=arguments.batch, seed=arguments.seed)
        working = folder.with_name(f".{family}")
        shutil.rmtree(working, ignore_errors=True)
        model.eval().save_pretrained(working)
        tokenizer.save_pretrained(working)
        working.rename(folder)
        print(f"{family}: training perplexity {math.exp(loss):.1f}, saved in {folder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
