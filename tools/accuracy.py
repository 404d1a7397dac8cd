#!/usr/bin/env python3
"""Perplexity from the paper's algorithms to ours, an idea at a time: what each gains and costs, in one run.

    python tools/accuracy.py demo --calib valid.txt --text test.txt --text alpaca.json --text self --out accuracy

All variants share one calibration and one count of parameters. Texts are files, data sets or `self`, text that the
dense model samples. accuracy.json and accuracy.md are written again after every figure: a run that is stopped keeps
what it has found.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.calibrate.observe import calibrate
from modegpt_graph.calibrate.sampling import sample_windows
from modegpt_graph.calibrate.text import SELF, SELF_WINDOW, SELF_WINDOWS, evaluation_windows
from modegpt_graph.compression import Prepared, prepare
from modegpt_graph.evaluate import perplexity
from modegpt_graph.evaluate.task_files import read_task
from modegpt_graph.evaluate.tasks import accuracies
from modegpt_graph.models import forward_logits, positions_of, resolve
from modegpt_graph.progress import Clock
from modegpt_graph.rewrite.decomposed import Decomposed, decompose
from modegpt_graph.rewrite.looseness import observed_beside
from modegpt_graph.rewrite.presets import PRESETS, Preset

PAPER, OURS = PRESETS["paper"], PRESETS["default"]
ONCE = ("sample", "decompose", "allocate")
GENERAL = replace(PAPER, other_share=OURS.other_share)
REFITTED = replace(OURS, recipe=replace(OURS.recipe, score="paper"))


@dataclass(frozen=True)
class Variant:
    """said: what it has more than the one above it."""

    said: str
    preset: Preset
    allocator: str
    recalibrates: bool = False


VARIANTS: Mapping[str, Variant] = {
    "paper-uniform": Variant("the paper's algorithms, uniform", PAPER, "uniform"),
    "paper": Variant("the paper to the letter: Block Influence", PAPER, "block-influence"),
    "general": Variant("calibration also on general text", GENERAL, "block-influence"),
    "refits": Variant("value/output by what heads put out, biases and a ridge in refits", REFITTED, "block-influence"),
    "greedy": Variant("query/key pairs chosen greedily", OURS, "block-influence"),
    "one-shot": Variant("allocation by error curves and measured weights", OURS, "curves"),
    "default": Variant("recalibration: all that is ours", OURS, "curves", recalibrates=True),
    "uniform": Variant("all that is ours, but uniform", OURS, "uniform", recalibrates=True),
}


class Run:
    """One model, its calibration and its texts; figures are added to `found` as they come."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.prepared: Prepared = prepare(
            resolve(arguments.model),
            calibration=arguments.calib,
            windows=arguments.windows,
            window=arguments.window,
            evaluating=False,
            seed=arguments.seed,
            preset="paper",  # its calibration serves every variant
        )
        dense = self.prepared.decomposed.dense
        self.texts = {Path(text).stem: self._tokens(text, dense) for text in arguments.text}
        self.tasks = [read_task(task, arguments.questions) for task in arguments.tasks]
        start = time.perf_counter()
        for window in self.prepared.text.tokens.split(1):
            with torch.no_grad():
                forward_logits(dense, window)
        self.forward = time.perf_counter() - start
        self.found: dict[str, Any] = {
            "model": arguments.model,
            "calibration": _size(arguments.calib, self.prepared.text.tokens),
            "fallback_reason": self.prepared.text.fallback_reason,
            "evaluation": [_size(name, tokens) for name, tokens in self.texts.items()],
            "seed": arguments.seed,
            "forward_seconds": self.forward,
            "calibrate_seconds": self.prepared.clock.seconds["calibrate"],
            "results": [],
        }

    def _tokens(self, text: str, dense: nn.Module) -> Tensor:
        a = self.arguments
        if text == SELF:
            return sample_windows(dense, SELF_WINDOWS, SELF_WINDOW, a.seed + 1)  # not what is calibrated on
        window = min(a.eval_window, positions_of(dense) or a.eval_window)
        return evaluation_windows(text, self.prepared.tokenizer, window, a.eval_windows)

    def measure(self) -> dict[str, Any]:
        self._add("dense", 0.0, self.prepared.decomposed.dense)
        made: tuple[Preset | None, Decomposed] = None, self.prepared.decomposed
        for name in self.arguments.variants:
            variant, clock = VARIANTS[name], Clock()
            if made[0] != variant.preset:
                made = variant.preset, self._decomposed(variant.preset, clock)
            one = replace(self.prepared, decomposed=made[1], recalibrates=variant.recalibrates)
            for ratio in self.arguments.ratios:
                with clock("allocate"):
                    ranks = one.ranks(ratio, variant.allocator)
                model = one.build(ranks, clock).model
                self._add(name, ratio, model, one.decomposed.removed(ranks) / one.decomposed.total, clock.seconds)
                clock = Clock()
        return self.found

    def _decomposed(self, preset: Preset, clock: Clock) -> Decomposed:
        of = self.prepared.decomposed
        run = partial(calibrate, of.dense, of.modules, of.layers, value_inputs=preset.value_inputs)
        with clock("sample"):
            text = self.prepared.text.with_other(of.dense, preset.other_share, self.arguments.seed)
            observed = observed_beside(of.observed, text.other, of.modules, run)
        with clock("decompose"):
            return decompose(
                of.dense,
                of.surveyed,
                of.modules,
                of.layers,
                observed,
                text.parts,
                of.costs,
                preset=preset,
            )

    def _add(
        self,
        name: str,
        ratio: float,
        model: nn.Module,
        removed: float = 0.0,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        values = {text: perplexity(model, tokens) for text, tokens in self.texts.items()}
        right = accuracies(model, self.prepared.tokenizer, self.tasks) if self.tasks else ()
        self.found["results"].append(
            {
                "variant": name,
                "ratio": ratio,
                "removed": removed,
                "perplexity": values,
                "tasks": [asdict(one) for one in right],
                "seconds": dict(seconds or {}),
            }
        )
        write(self.found, self.arguments.out)
        print(f"{name} at {ratio:g}: " + ", ".join(f"{value:.2f} {text}" for text, value in values.items()), flush=True)


def tables(found: Mapping[str, Any]) -> str:
    """For every text one row a variant, one column a ratio; what each costs; every task."""
    dense, *results = found["results"]
    ratios = sorted({one["ratio"] for one in results})
    variants = list(dict.fromkeys(one["variant"] for one in results))
    of = {(one["variant"], one["ratio"]): one for one in results}
    shown = [
        f"{found['model']}: calibrated on {found['calibration']}, evaluated on {'; '.join(found['evaluation'])}, "
        f"seed {found['seed']}. In brackets: the loss in log-perplexity over that of the paper's algorithms.\n"
    ]
    for text, best in dense["perplexity"].items():

        def cell(name: str, ratio: float, text: str = text, best: float = best) -> str:
            if (name, ratio) not in of:
                return ""
            value, paper = of[name, ratio]["perplexity"][text], of.get(("paper", ratio))
            if paper is None:
                return f"{value:.2f}"
            return f"{value:.2f} ({math.log(value / best) / math.log(paper['perplexity'][text] / best):.2f})"

        rows = [[name, VARIANTS[name].said, *(cell(name, ratio) for ratio in ratios)] for name in variants]
        shown.append(f"**{text}**, dense {best:.2f}\n")
        shown.append(_markdown(["variant", "with", *(f"{ratio:g}" for ratio in ratios)], rows))
    shown.append(
        f"Cost in forward passes over the calibration text ({found['forward_seconds']:.1f} s each), beside the "
        f"calibration's {found['calibrate_seconds'] / found['forward_seconds']:.2f}:\n"
    )
    rows = []
    for name in variants:
        seconds = [one["seconds"] for one in results if one["variant"] == name]
        once = sum(seconds[0].get(stage, 0.0) for stage in ONCE)  # later ratios find the weights measured
        each = sum(sum(value for stage, value in one.items() if stage not in ONCE) for one in seconds) / len(seconds)
        rows.append([name, *(f"{value / found['forward_seconds']:.2f}" for value in (once, each))])
    shown.append(_markdown(["variant", "once", "for each ratio"], rows))
    if dense["tasks"]:
        head = ["variant", "ratio", *(task["name"] for task in dense["tasks"])]
        rows = [
            [
                one["variant"],
                f"{one['ratio']:g}",
                *(f"{100 * task['normalised']:.1f} ± {100 * task['normalised_error']:.1f}" for task in one["tasks"]),
            ]
            for one in found["results"]
        ]
        shown.append("Zero-shot accuracy by length-normalised log-likelihood, in per cent:\n")
        shown.append(_markdown(head, rows))
    return "\n".join(shown)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(found: Mapping[str, Any], out: Path | None) -> None:
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if len(found["results"]) > 1:
            out.with_suffix(".md").write_text(tables(found), encoding="utf-8")


def _size(text: str, tokens: Tensor) -> str:
    return f"{tokens.shape[0]:,} windows of {tokens.shape[1]:,} tokens of {Path(text).name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo", help="hub id, folder, .gguf file or demo")
    parser.add_argument("--calib", required=True, help="calibration text: a file or a data set's name, or self")
    parser.add_argument("--text", action="append", required=True, help="text to evaluate on; may be given again")
    parser.add_argument("--tasks", nargs="+", default=[], help="task files (.jsonl), as for eval")
    parser.add_argument("--questions", type=int, help="of each task; all without")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
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
    print("\n" + tables(Run(arguments).measure()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
