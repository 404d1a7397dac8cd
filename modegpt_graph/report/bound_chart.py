"""Errors and bounds over the share of features kept, as inline SVG that takes its colours from the page."""

import math
from html import escape

from modegpt_graph.report import words
from modegpt_graph.report.bounds import BoundSeries, CurveAt, Spread

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 220, 56, 110, 10, 38
LOWEST = 1e-6  # an error below is drawn there


def bound_chart(series: BoundSeries) -> str:
    """Median, least and largest error and bound at a few ranks, and a dot for the chosen rank of every site.

    Empty where there is nothing to draw.
    """
    values = [value for at in series.curve for value in (at.error.least, at.bound.largest)]
    values += [value for _, error, bound in series.chosen for value in (error, bound)]
    values = [max(value, LOWEST) for value in values if math.isfinite(value)]
    if not values:
        return ""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    high = max(high, low + 1)

    def x(kept: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * kept

    def y(value: float) -> float:
        share = (math.log10(max(min(value, 10.0**high), LOWEST)) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    title = f"{series.roles}: error and bound over the share of features kept"
    parts = [f'<svg class="bounds" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for power in range(low, high + 1):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        )
    for kept in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<text x="{x(kept):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{kept:.0%}</text>')
    parts.append(f'<text x="{x(0.5):.1f}" y="{HEIGHT - 5}" text-anchor="middle">features kept</text>')
    for name, of in (("bound", _bound), ("error", _error)):
        parts.append(f'<g class="{name}">')
        if series.curve:
            upper = [f"{x(at.kept):.1f} {y(of(at).largest):.1f}" for at in series.curve]
            lower = [f"{x(at.kept):.1f} {y(of(at).least):.1f}" for at in reversed(series.curve)]
            parts.append(f'<path class="band" d="M{" L".join(upper + lower)} Z"/>')
            middle = " L".join(f"{x(at.kept):.1f} {y(of(at).middle):.1f}" for at in series.curve)
            parts.append(f'<path class="middle" d="M{middle}"/>')
            end = series.curve[-1]
            parts.append(f'<text class="name" x="{x(end.kept) + 8:.1f}" y="{y(of(end).middle) + 4:.1f}">{name}</text>')
        place = 1 if name == "error" else 2
        for chosen in series.chosen:
            tip = f"{chosen[0]:.0%} kept: error {words.figure(chosen[1])}, at most {words.figure(chosen[2])}"
            spot = f'cx="{x(chosen[0]):.1f}" cy="{y(chosen[place]):.1f}" r="2.5"'
            parts.append(f"<circle {spot}><title>{escape(tip)}</title></circle>")
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def _error(at: CurveAt) -> Spread:
    return at.error


def _bound(at: CurveAt) -> Spread:
    return at.bound
