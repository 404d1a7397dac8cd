"""How far every causal language model type of the installed transformers library gets, at tiny random size.

    python tools/coverage.py --jobs 2 --out tools/coverage.json --readme README.md

Each type is built (tools/tiny.py), analysed, rewritten at full rank in shuffled order, compressed by 30 %, saved,
loaded and asked to generate, in a process of its own with a time limit. The result file is written after every type and
a partial one is continued; a table (.md) stands beside it, and the summary goes between the markers of the README.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

RATIO = 0.3
NEIGHBOURS = (0.31, 0.29, 0.32, 0.28)
LOSSLESS = 1e-4  # of the largest logit: float32, sums of a few hundred terms in another order
PRELOAD = ["torch", "transformers", "torch.export", "torch._dynamo", "modegpt_graph.api"]
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
Row = dict[str, Any]


def examine(kind: str, *, analyze_only: bool = False) -> Row:
    """One row of the table: how far a type gets, and the reason where it stops."""
    from modegpt_graph.errors import ModegptError

    row: Row = {"type": kind, "stopped": None, "unexpected": False, "seconds": {}}
    steps: list[tuple[str, Callable[[Row], None]]] = [("build", _build), ("analyze", _analyze)]
    if not analyze_only:
        steps += [("verify", _verify), ("compress", _compress), ("reload", _reload)]
    for name, step in steps:
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the library's own, of its tiny configurations
                step(row)
        except Exception as error:  # a sweep says of everything how it ended
            row["stopped"] = f"{name}: {_one_line(error)}"
            row["unexpected"] = name != "build" and not isinstance(error, ModegptError)
            break
        finally:
            row["seconds"][name] = round(time.perf_counter() - start, 1)
    row.pop("_", None)
    return row


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [""])[0]
    from modegpt_graph.errors import ModegptError

    return said if isinstance(error, ModegptError) else f"{type(error).__name__}: {said}"


def _share_surveys() -> None:
    """The steps that are given the same model in this process share its trace: that is most of their time."""
    from modegpt_graph import api, compression
    from modegpt_graph.match import prepare

    known: dict[tuple[object, ...], tuple[Any, Any]] = {}

    def survey_model(source: Any, patterns: Any, *rest: Any, **options: Any) -> Any:
        key = (id(source.module), tuple(pattern.name for pattern in patterns), str(options))
        if source.module is None or key not in known:
            known[key] = source.module, prepare.survey_model(source, patterns, *rest, **options)
        return known[key][1]

    for room in (api, compression):
        vars(room)["survey_model"] = survey_model


def _build(row: Row) -> None:
    from tiny import tiny_model

    model = tiny_model(row["type"])
    row["class"] = type(model).__name__
    row["_"] = {"model": model}


def _analyze(row: Row) -> None:
    from modegpt_graph.api import survey_model
    from modegpt_graph.match.prepare import read_patterns
    from modegpt_graph.models import resolve

    surveyed = survey_model(resolve(row["_"]["model"]), read_patterns())
    found = surveyed.analysis
    row["attention"] = _attention(surveyed.trace)
    row["decoder_linear_parameters"] = found.model.decoder_linear_parameters
    row["coverage"] = round(found.coverage, 4)
    row["sites"] = dict(
        Counter(f"{s.type} {s.commutant} {s.decomposition or 'refused'}" for s in found.sites).most_common()
    )
    row["refused"] = _counted(f"{s.pattern}: {s.reason}" for s in found.sites if s.decomposition is None)
    row["unmatched"] = _counted(f"{_unnumbered(one.parameter)}: {one.reason}" for one in found.unmatched)


def _attention(trace: Any) -> str:
    """How positions are mixed: by weights of a softmax in all layers and by nothing else, in some, or in none."""
    from modegpt_graph.match.decoder import decoder_layers
    from modegpt_graph.match.products import attention_graph

    layers = decoder_layers(trace)
    graph = attention_graph(trace)
    attending, others = set(), False
    for key in graph.nodes:
        others |= "conv" in graph.operation(key)
        if graph.operation(key) == "mix":
            others |= not _is_of_softmax(graph, graph.operands(key)[0])
            stack = graph.traced(key).meta.get("nn_module_stack") or {}
            attending |= {where.removeprefix("module.") for where, _ in stack.values()} | {""}
    if attending.issuperset(layers) and not others:
        return "all"
    return "some" if attending else "none"


def _is_of_softmax(graph: Any, key: str) -> bool:
    """Whether a value is what a softmax made of products with matrices: no recurrence, no attention without one."""
    queue, seen = [key], set()
    while queue:
        one = queue.pop()
        if graph.operation(one) in ("weights", "softmax", "_softmax"):
            return True
        if one not in seen and graph.linear(one) is None:
            seen.add(one)
            queue += graph.operands(one)
    return False


def _counted(reasons: Iterable[str]) -> dict[str, int]:
    return dict(Counter(map(_unnumbered, reasons)).most_common())


def _unnumbered(text: str) -> str:
    """The same text for every layer."""
    return re.sub(r"(?<=[.`_])\d+(?=[.`]|$)", "N", text)


def _verify(row: Row) -> None:
    import modegpt_graph as mg
    from modegpt_graph.api import survey_model
    from modegpt_graph.match.prepare import read_patterns
    from modegpt_graph.models import resolve

    row["left"] = _counted(survey_model(resolve(row["_"]["model"]), read_patterns()).left.values())
    proof = mg.verify(row["_"]["model"])
    row["lossless"] = proof.max_relative_error
    row["generation_identical"] = proof.generation_identical
    row["rewritten_sites"] = proof.sites


def _compress(row: Row) -> None:
    import torch

    import modegpt_graph as mg
    from modegpt_graph.errors import InputError
    from modegpt_graph.models import vocabulary_of

    model = row["_"]["model"]
    tokens = torch.randint(0, vocabulary_of(model), (8, 32), generator=torch.Generator().manual_seed(1))
    row["_"]["tokens"] = tokens
    for ratio in (RATIO, *NEIGHBOURS):  # a single step of rank is coarse in a model this small
        try:
            row["_"]["result"] = mg.compress(model, ratio, calibration=tokens)
        except InputError as error:
            if "between two steps" not in str(error) or ratio == NEIGHBOURS[-1]:
                raise
        else:
            row["ratio"] = ratio
            return


def _reload(row: Row) -> None:
    import torch

    import modegpt_graph as mg
    from modegpt_graph.models import forward_logits

    result, tokens = row["_"]["result"], row["_"]["tokens"][:2]
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "small")
        loaded = mg.load(Path(folder) / "small")
    with torch.no_grad():
        before, after = forward_logits(result.model, tokens), forward_logits(loaded, tokens)
        row["reloaded_error"] = float((before - after).abs().max() / before.abs().max())
        row["reloaded_generates_the_same"] = torch.equal(_generated(result.model, tokens), _generated(loaded, tokens))


def _generated(model: Any, tokens: Any) -> Any:
    import torch

    return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, pad_token_id=0
    )


def _in_child(kind: str, analyze_only: bool, connection: Any) -> None:
    import torch

    torch.set_num_threads(1)
    _share_surveys()
    connection.send(examine(kind, analyze_only=analyze_only))
    connection.close()


def examine_apart(kind: str, limit: float, analyze_only: bool) -> Row:
    """`examine` in a process of its own, ended after `limit` seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(kind, analyze_only, sender))
    process.start()
    sender.close()
    row: Row = {"type": kind, "stopped": f"longer than {limit:g} seconds", "unexpected": True}
    try:
        if receiver.poll(limit):
            row = receiver.recv()
    except EOFError:
        row["stopped"] = "the process died"
    if process.is_alive():
        process.terminate()
    process.join()
    return row


def sweep(kinds: Iterable[str], out: Path, *, jobs: int, limit: float, minutes: float, analyze_only: bool) -> None:
    """Examine every type that `out` has no row of; none is begun after `minutes`."""
    rows = read_rows(out)
    end = time.monotonic() + 60 * minutes

    def one(kind: str) -> None:
        if time.monotonic() > end:
            return
        row = examine_apart(kind, limit, analyze_only)
        rows[kind] = row
        write_rows(out, rows)
        print(_line(row), flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [kind for kind in kinds if kind not in rows]))


def read_rows(out: Path) -> dict[str, Row]:
    return json.loads(out.read_text(encoding="utf-8"))["types"] if out.is_file() else {}


def write_rows(out: Path, rows: Mapping[str, Row]) -> None:
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    whole = versions | {"summary": summary(rows), "types": dict(sorted(rows.items()))}
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    partial.replace(out)
    out.with_suffix(".md").write_text(table(rows, versions), encoding="utf-8")


def passed(row: Row) -> bool:
    """Lossless, compressed, reloaded, and generating the same as before it was saved."""
    lossless = row.get("lossless", 1.0) < LOSSLESS and row.get("generation_identical") is True
    return lossless and row.get("reloaded_generates_the_same", False) and row["stopped"] is None


def summary(rows: Mapping[str, Row]) -> dict[str, Any]:
    """The counts that the README states."""
    from tiny import model_types

    analysed = [row for row in rows.values() if "coverage" in row]
    attending = [row["coverage"] for row in analysed if row["attention"] == "all"]
    return {
        "registered": len(model_types()),
        "types": len(rows),
        "analysed": len(analysed),
        "attention_based": len(attending),
        "mean_coverage_attention_based": round(sum(attending) / max(len(attending), 1), 4),
        "lossless": sum(row.get("lossless", 1.0) < LOSSLESS for row in analysed),
        "passed": sum(map(passed, analysed)),
    }


def _line(row: Row) -> str:
    figures = f"{row['coverage']:.3f} {row['attention']}" if "coverage" in row else "-"
    state = row["stopped"] or ("passed" if passed(row) else f"lossless {row.get('lossless')}")
    return f"{row['type']:26} {figures:12} {sum(row.get('seconds', {}).values()):5.1f} s  {state}"


def table(rows: Mapping[str, Row], versions: Mapping[str, str]) -> str:
    """The rows as Markdown."""
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = ["type", "coverage", "attention", "sites", "lossless", "reloaded", "stopped"]
    lines = [f"# Every causal language model type of the library, at tiny random size ({said})", "", counts(rows), ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for kind, row in sorted(rows.items()):
        sites = "; ".join(f"{count}× {name}" for name, count in row.get("sites", {}).items())
        left = "; ".join(f"{count} left as they are: {reason}" for reason, count in row.get("left", {}).items())
        lossless = f"{row['lossless']:.0e}" if "lossless" in row else ""
        same = row.get("reloaded_generates_the_same")
        reloaded = "" if same is None else "same" if same else "differs"
        covered = f"{row['coverage']:.3f}" if "coverage" in row else ""
        cells = [kind, covered, row.get("attention", ""), sites, lossless, reloaded, row["stopped"] or left]
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def counts(rows: Mapping[str, Row]) -> str:
    """The summary in words."""
    found = summary(rows)
    return (
        f"Of {found['types']} types examined, out of {found['registered']} that the library has, "
        f"{found['analysed']} are analysed; over the {found['attention_based']} whose layers all attend, "
        f"{found['mean_coverage_attention_based']:.1%} of the decoder's linear parameters are in sites. "
        f"{found['passed']} pass everything: a full-rank rewrite in shuffled order leaves the logits as they were, and "
        "the model compressed by 30 %, saved and loaded, generates the same. Of every other type the table says in one "
        "line why not."
    )


def put_into(readme: Path, rows: Mapping[str, Row]) -> None:
    """Write the summary between the markers. Raises ValueError where there are none."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no markers {BEGIN} … {END}")
    readme.write_text(f"{before}{begin}\n{counts(rows)}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types to examine; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "coverage.json")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one type")
    parser.add_argument("--minutes", type=float, default=60, help="begin no type after this time")
    parser.add_argument("--analyze-only", action="store_true")
    parser.add_argument("--readme", type=Path)
    given = parser.parse_args()
    from tiny import model_types

    kinds = given.types or model_types()
    sweep(kinds, given.out, jobs=given.jobs, limit=given.limit, minutes=given.minutes, analyze_only=given.analyze_only)
    rows = read_rows(given.out)
    print(counts(rows))
    if given.readme is not None:
        put_into(given.readme, rows)


if __name__ == "__main__":
    main()
