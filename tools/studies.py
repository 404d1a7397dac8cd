#!/usr/bin/env python3
"""The paper's studies at a small scale, each as a JSON file and a Markdown page.

    python tools/studies.py ratio demo --calib valid.txt --text test.txt --out studies/demo

writes studies/demo-ratio.json and .md again after every figure: a run that is stopped goes on where it was. Studies:

    ratio        perplexity at ratios from 0 to 80 % (table 25)
    modules      each kind of pair alone, at the same share of its own features (table 23)
    temperature  the entropic allocation at several temperatures (table 19)
    size         how much calibration text is needed (figure 11)
    texts        every calibration text on every evaluation text (table 26); --alpaca names the second
    quantised    weights rounded to 8 or 4 bits, before and after (the paper composes both)
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modegpt_graph.allocate.budget import Target, ranks_for_ratios
from modegpt_graph.allocate.entropic import entropic_ratios
from modegpt_graph.api import analyze
from modegpt_graph.calibrate.sampling import sample_windows
from modegpt_graph.calibrate.text import calibration_windows, evaluation_windows
from modegpt_graph.compression import Prepared, prepare
from modegpt_graph.evaluate import perplexity
from modegpt_graph.models import resolve
from modegpt_graph.progress import Clock

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TEMPERATURES = (0.05, 0.1, 0.15, 0.3, 1.0, math.inf)
SIZES = (1, 2, 4, 8, 16, 32)
QUANTISED_GROUP = 128  # weights of a row that share a scale
PRESETS = ("default", "paper")


@dataclass(frozen=True)
class Cell:
    """One figure of a table, and how it is found."""

    row: str
    column: str
    perplexity: Callable[[], float]


class Lab:
    """The model, its texts and what was prepared last. Nothing is read before it is asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self._cut: dict[tuple[str, int | None], Tensor] = {}
        self.prepared = lru_cache(maxsize=1)(self._prepared)

    @cached_property
    def dense(self) -> nn.Module:
        return resolve(self.arguments.model).load()

    @cached_property
    def tokenizer(self) -> Any:
        return resolve(self.arguments.model).tokenizer()

    @cached_property
    def texts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name → windows to calibrate and to evaluate on, which have nothing in common."""
        a = self.arguments
        wanted = {"windows": a.windows, "window": a.window, "seed": a.seed}
        found = {
            "wikitext2": (
                calibration_windows(a.calib, self.tokenizer, **wanted).tokens,
                evaluation_windows(a.text, self.tokenizer, a.eval_window, a.eval_windows),
            )
        }
        if a.study == "texts":
            if a.alpaca is not None:
                every = evaluation_windows(a.alpaca, self.tokenizer, a.eval_window)
                rest = every[a.eval_windows :].flatten()
                rest = rest[: len(rest) // a.window * a.window].view(-1, a.window)
                found["alpaca"] = (rest[: a.windows], every[: a.eval_windows])
            length = a.windows * a.window // 4  # a forward pass for every token: fewer of them
            sampled = [sample_windows(self.dense, max(1, length // 128), 128, seed=a.seed + part) for part in (0, 1)]
            found["self-sampled"] = (sampled[0], sampled[1])
        return found

    def _prepared(self, preset: str, calibration: Tensor, dense: nn.Module) -> Prepared:
        return prepare(resolve(dense), calibration=calibration, evaluating=False, preset=preset)

    def of(self, preset: str, text: str = "wikitext2", windows: int | None = None) -> Prepared:
        """The dense model, prepared on a text."""
        return self.prepared(preset, self._calibration(text, windows), self.dense)

    def _calibration(self, text: str, windows: int | None) -> Tensor:
        """The same tensor whenever it is asked for, so that what was prepared on it is known."""
        return self._cut.setdefault((text, windows), self.texts[text][0][:windows])

    @cached_property
    def kinds(self) -> dict[str, set[str]]:
        """Pattern → the sites that are of it and can be made smaller."""
        found: dict[str, set[str]] = {}
        for site in analyze(self.arguments.model).sites:
            if site.decomposition is not None:
                found.setdefault(site.pattern, set()).add(site.id)
        return found

    def measure(self, model: nn.Module, text: str = "wikitext2") -> float:
        return perplexity(model, self.texts[text][1])


def ratio(lab: Lab) -> Iterator[Cell]:
    for preset in PRESETS:
        for share in RATIOS:

            def found(preset: str = preset, share: float = share) -> float:
                return lab.measure(lab.of(preset).at(share).model if share else lab.dense)

            yield Cell(preset, f"{share:g}", found)


def modules(lab: Lab) -> Iterator[Cell]:
    for kind, sites in lab.kinds.items():
        for share in lab.arguments.ratios:

            def found(sites: set[str] = sites, share: float = share) -> float:
                prepared = lab.of("default")
                ranks = {
                    item.id: item.nearest(item.full_rank * (1 - share)) if item.id in sites else item.full_rank
                    for item in prepared.decomposed.items
                }
                return lab.measure(prepared.build(ranks, Clock()).model)

            yield Cell(kind, f"{share:g}", found)


def temperature(lab: Lab) -> Iterator[Cell]:
    for value in TEMPERATURES:
        for share in lab.arguments.ratios:

            def found(value: float = value, share: float = share) -> float:
                prepared = lab.of("paper")
                one = prepared.decomposed
                ratios = entropic_ratios(one.observed.importance, share, value).tolist()
                ranks = ranks_for_ratios(one.items, dict(enumerate(ratios)), Target(one.total, share))
                return lab.measure(prepared.build(ranks, Clock()).model)

            yield Cell("∞ (uniform)" if math.isinf(value) else f"{value:g}", f"{share:g}", found)


def size(lab: Lab) -> Iterator[Cell]:
    for windows in (count for count in SIZES if count <= lab.arguments.windows):
        for preset in PRESETS:
            for share in lab.arguments.ratios:

                def found(windows: int = windows, preset: str = preset, share: float = share) -> float:
                    return lab.measure(lab.of(preset, windows=windows).at(share).model)

                yield Cell(f"{windows} × {lab.arguments.window:,} tokens", f"{preset} at {share:g}", found)


def texts(lab: Lab) -> Iterator[Cell]:
    names = ["wikitext2", *(["alpaca"] if lab.arguments.alpaca else []), "self-sampled"]
    share = lab.arguments.ratios[0]
    for on in names:
        yield Cell("dense", on, lambda on=on: lab.measure(lab.dense, on))
    for calibrated in names:
        for on in names:

            def found(calibrated: str = calibrated, on: str = on) -> float:
                return lab.measure(lab.of("default", calibrated).at(share).model, on)

            yield Cell(f"calibrated on {calibrated}", on, found)


def quantised(lab: Lab) -> Iterator[Cell]:
    share = lab.arguments.ratios[0]
    for bits in (None, 8, 4):
        name = "not rounded" if bits is None else f"{bits} bits"
        yield Cell("dense", name, lambda bits=bits: lab.measure(rounded(lab.dense, bits)))
        if bits is None:
            yield Cell(f"compressed by {share:g}", name, lambda: lab.measure(lab.of("default").at(share).model))
            continue

        def after(bits: int = bits) -> float:
            return lab.measure(rounded(lab.of("default").at(share).model, bits))

        def before(bits: int = bits) -> float:
            coarse = prepare(resolve(rounded(lab.dense, bits)), calibration=lab.texts["wikitext2"][0], evaluating=False)
            return lab.measure(coarse.at(share).model)

        yield Cell(f"compressed by {share:g}, then rounded", name, after)
        yield Cell(f"rounded, then compressed by {share:g}", name, before)


def rounded(model: nn.Module, bits: int | None) -> nn.Module:
    """A copy whose matrices within layers are on the grid of `bits`-bit integers, a scale for every group of a row."""
    if bits is None:
        return model
    result, largest = copy.deepcopy(model), 2 ** (bits - 1) - 1
    embeddings = {id(part.weight) for part in result.modules() if isinstance(part, nn.Embedding)}
    for parameter in result.parameters():
        if parameter.ndim == 2 and id(parameter) not in embeddings:
            for part in parameter.data.split(QUANTISED_GROUP, dim=1):
                scale = part.abs().amax(1, keepdim=True).clamp_min(1e-12) / largest
                part.copy_((part / scale).round() * scale)
    return result


STUDIES: dict[str, tuple[str, Callable[[Lab], Iterator[Cell]]]] = {
    "ratio": ("preset", ratio),
    "modules": ("pairs made smaller", modules),
    "temperature": ("ε", temperature),
    "size": ("calibration text", size),
    "texts": ("perplexity on", texts),
    "quantised": ("weights", quantised),
}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    lab = Lab(arguments)
    names = ("model", "study", "ratios", "windows", "window", "eval_windows", "eval_window", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {name: Path(value).name for name in ("calib", "text", "alpaca") if (value := getattr(arguments, name))}
    path = arguments.out.with_name(f"{arguments.out.name}-{arguments.study}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": settings, "cells": []}
    if found["settings"] != settings:
        sys.exit(f"{path} is from a run with other settings; name another --out or remove it")
    known = {(cell["row"], cell["column"]) for cell in found["cells"]}
    for cell in STUDIES[arguments.study][1](lab):
        if (cell.row, cell.column) in known:
            continue
        start = time.perf_counter()
        value = cell.perplexity()
        seconds = time.perf_counter() - start
        found["cells"].append({"row": cell.row, "column": cell.column, "perplexity": value, "seconds": seconds})
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page(found), encoding="utf-8")
        print(f"{cell.row}, {cell.column}: {value:.2f} ({seconds:.0f} s)", flush=True)
    return found


def page(found: dict[str, Any]) -> str:
    """A table of perplexities, and what it was measured on."""
    one = found["settings"]
    values = {(cell["row"], cell["column"]): cell["perplexity"] for cell in found["cells"]}
    columns = list(dict.fromkeys(column for _, column in values))
    head = [STUDIES[one["study"]][0], *columns]
    rows = [head, ["---", *("--:" for _ in columns)]]
    for row in dict.fromkeys(row for row, _ in values):
        cells = (values.get((row, column)) for column in columns)
        rows.append([row, *("" if value is None else f"{value:.2f}" for value in cells)])
    said = (
        f"Perplexity of {one['model']}. Calibration: {one['windows']} windows of {one['window']:,} tokens of "
        f"{one['calib']}, seed {one['seed']}. Evaluation: {one['eval_windows']} windows of {one['eval_window']:,} "
        f"tokens of {one['text']}."
    )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"# {one['study'].capitalize()}", "", said, "", *lines]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("model", nargs="?", default="demo", help="hub id, folder, .gguf file or demo")
    parser.add_argument("--calib", required=True, help="calibration text: a file or a data set's name")
    parser.add_argument("--text", required=True, help="text to evaluate on: a file or a data set's name")
    parser.add_argument("--alpaca", help="a second kind of text, for `texts`: one file for both, cut in two")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3], help="for every study but `ratio`")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=8)
    parser.add_argument("--eval-window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch; its own choice without")
    parser.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="write PREFIX-STUDY.json and .md")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print("\n" + page(run(arguments)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
