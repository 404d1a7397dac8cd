#!/usr/bin/env python3
"""Perplexity of a compressed model over ratios and allocators, as JSON and as a Markdown table.

    python tools/accuracy.py demo --calib valid.txt --text test.txt --out accuracy

writes accuracy.json and accuracy.md, again after every figure: a run that is stopped keeps what it has found.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from modegpt_graph.calibrate.text import evaluation_windows
from modegpt_graph.compression import prepare
from modegpt_graph.evaluate import perplexity
from modegpt_graph.models import resolve


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    prepared = prepare(
        resolve(arguments.model),
        calibration=arguments.calib,
        windows=arguments.windows,
        window=arguments.window,
        evaluating=False,
        seed=arguments.seed,
    )
    tokens = evaluation_windows(arguments.text, prepared.tokenizer, arguments.eval_window, arguments.eval_windows)
    found: dict[str, Any] = {
        "model": arguments.model,
        "calibration": _size(arguments.calib, prepared.text.tokens),
        "fallback_reason": prepared.text.fallback_reason,
        "evaluation": _size(arguments.text, tokens),
        "seed": arguments.seed,
        "seconds": prepared.clock.seconds,  # of what all ratios have in common
        "dense_perplexity": perplexity(prepared.decomposed.dense, tokens),
        "results": [],
    }
    print(f"dense: {found['dense_perplexity']:.2f}", flush=True)
    for allocator in arguments.allocators:
        for ratio in arguments.ratios:
            start = time.perf_counter()
            result = prepared.at(ratio, allocator)
            seconds = time.perf_counter() - start
            assert result.report.outcome is not None
            one = {
                "allocator": allocator,
                "ratio": ratio,
                "removed": result.report.outcome.ratios.decoder_linear,
                "perplexity": perplexity(result.model, tokens),
                "seconds": seconds,
            }
            found["results"].append(one)
            write(found, arguments.out)
            print(f"{allocator} at {ratio:g}: {one['perplexity']:.2f} ({seconds:.0f} s)", flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """One row an allocator, one column a ratio."""
    results = found["results"]
    ratios = sorted({one["ratio"] for one in results})
    values = {(one["allocator"], one["ratio"]): one["perplexity"] for one in results}
    rows = [
        ["allocator", "dense", *(f"{ratio:g}" for ratio in ratios)],
        ["---", "--:", *("--:" for _ in ratios)],
    ]
    for allocator in dict.fromkeys(one["allocator"] for one in results):
        cells = (values.get((allocator, ratio)) for ratio in ratios)
        rows.append(
            [
                allocator,
                f"{found['dense_perplexity']:.2f}",
                *("" if value is None else f"{value:.2f}" for value in cells),
            ]
        )
    head = (
        f"Perplexity of {found['model']}: calibrated on {found['calibration']}, evaluated on {found['evaluation']}, "
        f"seed {found['seed']}."
    )
    return "\n".join([head, "", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def write(found: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(table(found), encoding="utf-8")


def _size(text: str, tokens: torch.Tensor) -> str:
    return f"{tokens.shape[0]:,} windows of {tokens.shape[1]:,} tokens of {Path(text).name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo", help="hub id, folder, .gguf file or demo")
    parser.add_argument("--calib", required=True, help="calibration text: a file or a data set's name")
    parser.add_argument("--text", required=True, help="text to evaluate on: a file or a data set's name")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--allocators", nargs="+", default=["curves"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--eval-windows", type=int, default=10)
    parser.add_argument("--eval-window", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch; its own choice without")
    parser.add_argument("--out", type=Path, metavar="PREFIX", help="write PREFIX.json and PREFIX.md")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print("\n" + table(measure(arguments)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
