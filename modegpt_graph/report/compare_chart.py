"""Perplexity over ratio as inline SVG that takes its colours from the page; perplexity on a logarithmic axis."""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from modegpt_graph.report import words
from modegpt_graph.report.compare import Comparison, perplexity_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 380, 56, 150, 14, 34
LABEL_GAP = 14  # between the names at the right
HIGHEST = 50.0  # a curve that leaves the chart at this many times the dense perplexity is cut there

COLOURS = (
    "#1f6f8b",
    "#b3402f",
    "#8a8f96",
    "#c07c1e",
    "#2b7a4b",
    "#7a55a3",
    "#a8527f",
    "#5b7f2b",
    "#3f62b5",
    "#b08a00",
    "#66594d",
    "#2f8f8f",
)
CHART_STYLE = """
.curves { width: 100%; height: auto; display: block; }
.curves text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.curves .grid { stroke: var(--line); } .curves path { fill: none; stroke: currentColor; stroke-width: 2; }
.curves circle, .curves text.name { fill: currentColor; }
.curves .dense { stroke: var(--soft); stroke-dasharray: 4 4; }
""" + "".join(f".curve-{number} {{ color: {colour}; }}\n" for number, colour in enumerate(COLOURS))


def comparison_chart(comparison: Comparison) -> str:
    """A curve for each method, over the ratio that it achieved; empty where nothing was measured."""
    dense = comparison.perplexity_dense
    curves = {method: _points(comparison, method) for method in comparison.methods}
    curves = {method: points for method, points in curves.items() if points}
    if not curves:
        return ""
    values = [min(value, HIGHEST * dense) for points in curves.values() for _, value in points]
    low, high = math.log(min(dense, *values)) - 0.02, math.log(max(dense * 1.5, *values)) + 0.02
    right = max(ratio for points in curves.values() for ratio, _ in points) * 1.04

    def x(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ratio / right

    def y(value: float) -> float:
        place = (math.log(min(value, HIGHEST * dense)) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * place

    parts = [f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="perplexity over ratio">']
    for value in _ticks(math.exp(low), math.exp(high)):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for ratio in (0.0, *comparison.ratios):
        if ratio <= right:
            parts.append(f'<text x="{x(ratio):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{ratio:.0%}</text>')
    parts.append(f'<line class="dense" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(dense):.1f}" y2="{y(dense):.1f}"/>')
    ends = _spread([y(points[-1][1]) for points in curves.values()])
    for number, ((method, points), end) in enumerate(zip(curves.items(), ends, strict=True)):
        places = " L".join(f"{x(ratio):.1f} {y(value):.1f}" for ratio, value in [(0.0, dense), *points])
        parts.append(f'<g class="curve-{number % len(COLOURS)}"><path d="M{places}"/>')
        for ratio, value in points:
            tip = f"{method}: {perplexity_text(value)} at {words.percent(ratio)}"
            parts.append(
                f'<circle cx="{x(ratio):.1f}" cy="{y(value):.1f}" r="3.5"><title>{escape(tip)}</title></circle>'
            )
        parts.append(f'<text class="name" x="{WIDTH - RIGHT + 10}" y="{end + 4:.1f}">{escape(method)}</text></g>')
    return "".join(parts) + "</svg>"


def _points(comparison: Comparison, method: str) -> list[tuple[float, float]]:
    found = [
        (entry.achieved, entry.perplexity)
        for entry in comparison.of(method)
        if entry.achieved is not None and entry.perplexity is not None and math.isfinite(entry.perplexity)
    ]
    return sorted(found)


def _ticks(low: float, high: float) -> list[float]:
    """Round values within the axis: 1, 2 and 5 times powers of ten, finer ones where it is short."""
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(1 + place / 4 for place in range(36))):
        ticks = [step * 10.0**power for power in range(-1, 12) for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            return inside
    return inside


def _spread(places: Sequence[float]) -> list[float]:
    """Heights moved apart so that names do not cover each other, the lowest one within the chart."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + LABEL_GAP)
    moved[order[-1]] = min(moved[order[-1]], float(HEIGHT - BOTTOM))
    for below, above in pairwise(order[::-1]):
        moved[above] = min(moved[above], moved[below] - LABEL_GAP)
    return moved
