#!/usr/bin/env python3
"""What a compression costs, in plain forward passes over the same tokens, and how fast its result is.

Everything is timed in one run of one process: the forward pass and the compression one after the other, the dense and
the compressed model in turns. The figures that mean something on another machine are the ratios.

    python tools/bench.py demo --text valid.txt --windows 32 --json bench.json
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from modegpt_graph import api
from modegpt_graph.calibrate.text import calibration_windows
from modegpt_graph.evaluate import compare_throughput, random_prompt
from modegpt_graph.models import forward_logits, resolve


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


def forward_seconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """One pass over all windows, one at a time, after one that warms up."""
    with torch.no_grad():
        forward_logits(model, tokens[:1])
        start = time.perf_counter()
        for window in tokens.split(1):
            forward_logits(model, window)
        return time.perf_counter() - start


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    source = resolve(arguments.model)
    dense = source.load()
    vocabulary = dense.get_input_embeddings().num_embeddings  # type: ignore[operator,union-attr]
    if arguments.text is None:
        tokens, text = random_prompt(vocabulary, arguments.windows, arguments.window), "random token ids"
    else:
        chosen = calibration_windows(
            arguments.text, source.tokenizer(), windows=arguments.windows, window=arguments.window
        )
        tokens, text = chosen.tokens, Path(arguments.text).name
    load_before, loaded_bytes = os.getloadavg()[0], peak_bytes()
    _note("one forward pass over the calibration tokens")
    forward = forward_seconds(dense, tokens)
    forward_bytes = peak_bytes()
    _note(f"{forward:.1f} s; the compression of the same")
    start = time.perf_counter()
    result = api.compress(
        dense,
        arguments.ratio,
        calibration=tokens,
        allocator=arguments.allocator,
        evaluate=False,
        seed=arguments.seed,
        cache=False,
    )
    compression = time.perf_counter() - start
    outcome = result.report.outcome
    assert outcome is not None
    found: dict[str, Any] = {
        "model": arguments.model,
        "text": text,
        "windows": tokens.shape[0],
        "window": tokens.shape[1],
        "ratio": arguments.ratio,
        "allocator": outcome.allocator,
        "forward_seconds": forward,
        "compress_seconds": compression,
        "compress_over_forward": compression / forward,
        "without_recalibration_over_forward": (compression - outcome.seconds.get("recalibrate", 0.0)) / forward,
        "seconds_by_stage": dict(outcome.seconds),
        "peak_bytes": {"model loaded": loaded_bytes, "after the forward pass": forward_bytes, "in all": peak_bytes()},
        "threads": torch.get_num_threads(),
        "load_average": [load_before, os.getloadavg()[0]],
    }
    if arguments.rounds:
        _note(f"{compression:.1f} s; both models' speed")
        prompt = random_prompt(vocabulary, length=arguments.prompt, seed=arguments.seed)
        speed = compare_throughput(dense, result.model, prompt, arguments.new_tokens, arguments.rounds)
        for name in ("prefill", "decode"):
            found[name] = {
                "dense_tokens_per_second": getattr(speed.dense, name),
                "compressed_tokens_per_second": getattr(speed.compressed, name),
                "ratio": getattr(speed, f"{name}_ratio"),
            }
    return found


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def lines(found: dict[str, Any]) -> list[str]:
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["seconds_by_stage"].items())
    peaks = ", ".join(f"{count / 2**30:.2f} GiB {name}" for name, count in found["peak_bytes"].items())
    shown = [
        f"{found['model']} at ratio {found['ratio']:g} ({found['allocator']}), "
        f"{found['windows']} windows of {found['window']:,} tokens of {found['text']}",
        f"forward pass  {found['forward_seconds']:.1f} s",
        f"compress      {found['compress_seconds']:.1f} s   ({stages})",
        f"ratio         {found['compress_over_forward']:.2f} forward passes, "
        f"{found['without_recalibration_over_forward']:.2f} without recalibration",
        f"peak memory   {peaks}",
    ]
    for name in ("prefill", "decode"):
        if name in found:
            dense, smaller = found[name]["dense_tokens_per_second"], found[name]["compressed_tokens_per_second"]
            shown.append(f"{name:<13} {dense:.1f} → {smaller:.1f} tokens/s, {found[name]['ratio']:.2f} times the dense")
    before, after = found["load_average"]
    shown.append(f"machine       {found['threads']} threads, load average {before:.1f} before, {after:.1f} after")
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo", help="hub id, folder, .gguf file or demo")
    parser.add_argument("--text", help="calibration text; without it, random token ids: only the cost is measured")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--allocator", default="curves")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt whose reading is timed")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens whose writing is timed")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed comparison; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch; its own choice without")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found = bench(arguments)
    print("\n".join(lines(found)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
