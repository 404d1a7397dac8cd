"""The chart of ranks by layer, as inline SVG that takes its colours from the page."""

from html import escape

from modegpt_graph.report import words
from modegpt_graph.report.ranks import RankSeries

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 150, 44, 24, 10


def rank_chart(series: RankSeries) -> str:
    """A bar for each layer: the share of features kept, with layer, rank and error as its tooltip."""
    inner, tall = WIDTH - LEFT, HEIGHT - TOP - BOTTOM
    step = inner / max(len(series.layers), 12)
    gap = min(3.0, step * 0.25)
    title = f"{series.roles}: share of features kept in each layer"
    parts = [f'<svg class="ranks" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for share in (0.0, 0.5, 1.0):
        y = TOP + tall * (1 - share)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    every = -(-len(series.layers) // 16)
    for index, layer in enumerate(series.layers):
        x, height = LEFT + index * step, tall * min(1.0, layer.kept)
        tip = f"layer {layer.layer}: {round(layer.rank):,} of {round(layer.full_rank):,} kept ({layer.kept:.0%})"
        if layer.relative_error is not None:
            tip += f", relative error {words.figure(layer.relative_error)}"
        parts.append(
            f'<rect class="full" x="{x:.1f}" y="{TOP}" width="{step - gap:.1f}" height="{tall}"/>'
            f'<rect class="kept" x="{x:.1f}" y="{TOP + tall - height:.1f}" width="{step - gap:.1f}" '
            f'height="{height:.1f}"/>'
            f'<rect class="hit" x="{x:.1f}" y="{TOP}" width="{step:.1f}" height="{tall}">'
            f"<title>{escape(tip)}</title></rect>"
        )
        if index % every == 0:
            middle = x + (step - gap) / 2
            parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{layer.layer}</text>')
    return "".join(parts) + "</svg>"
