"""A comparison of methods as one HTML file that needs nothing else."""

from html import escape

from modegpt_graph.methods.names import METHODS
from modegpt_graph.methods.race import Entry
from modegpt_graph.report import words
from modegpt_graph.report.compare import Comparison, perplexity_text
from modegpt_graph.report.compare_chart import CHART_STYLE, comparison_chart
from modegpt_graph.report.style import STYLE, quoted, wide


def comparison_html(comparison: Comparison) -> str:
    """Header, perplexity over ratio as a chart, the table, the methods and their sources."""
    name = escape(comparison.model.name)
    body = [_header(comparison), _chart(comparison), _table(comparison), _methods(comparison)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} · methods compared · modegpt-graph</title>\n<style>{STYLE}{CHART_STYLE}</style>\n</head>\n"
        "<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _header(comparison: Comparison) -> str:
    model = comparison.model
    facts = [
        ("dense perplexity", perplexity_text(comparison.perplexity_dense)),
        ("parameters", words.count(model.parameters)),
        ("in decoder-layer matrices", words.count(model.decoder_linear_parameters)),
    ]
    cells = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)
    fallback = ""
    if comparison.fallback_reason:
        reason = escape(words.sentence(comparison.fallback_reason, start=False))
        fallback = f'<p class="bad">Not the text asked for: {reason}</p>'
    return (
        '<header>\n<p class="kind">Methods compared by modegpt-graph</p>\n'
        f'<h1>{escape(model.name)}</h1>\n<p class="soft">{escape(model.architecture)}</p>\n'
        f'<dl class="facts">{cells}</dl>\n'
        f"<p>Calibrated on {escape(words.sentence(comparison.calibration, start=False))} "
        f"Perplexity measured on {escape(words.sentence(comparison.evaluation, start=False))} Seed {comparison.seed}."
        f"</p>{fallback}\n</header>"
    )


def _chart(comparison: Comparison) -> str:
    chart = comparison_chart(comparison)
    return f"<section>\n<h2>Perplexity over ratio</h2>\n{wide(chart)}\n</section>" if chart else ""


def _table(comparison: Comparison) -> str:
    heads = "".join(f'<th class="number">{words.percent(ratio)}</th>' for ratio in comparison.ratios)
    rows = "".join(
        f"<tr><td>{escape(method)}</td>"
        + "".join(_cell(entry, comparison.best(entry.ratio) is entry) for entry in comparison.of(method))
        + "</tr>"
        for method in comparison.methods
    )
    reasons = "".join(
        f"<p><b>{escape(method)}</b>: {quoted(words.sentence(reason, start=False))}</p>"
        for method, reason in comparison.reasons().items()
    )
    return (
        '<section>\n<h2>Perplexity, and the share that went</h2>\n<div class="scroll"><table><thead><tr><th>method</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>\n{reasons}\n"
        '<p class="soft">The ratio is of the parameters of the decoder layers\' matrices; adapters that a method adds '
        "count as parameters.</p>\n</section>"
    )


def _cell(entry: Entry, best: bool) -> str:
    if entry.perplexity is None or entry.achieved is None:
        return '<td class="number soft">not available</td>'
    text = escape(perplexity_text(entry.perplexity))
    shown = f'<b class="good">{text}</b>' if best else text
    return f'<td class="number">{shown}<br><span class="soft">{words.percent(entry.achieved)}</span></td>'


def _methods(comparison: Comparison) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(words.sentence(METHODS[name].summary))}</td>"
        f"<td>{quoted(METHODS[name].source)}</td>"
        f'<td class="number">{words.seconds(sum(entry.seconds for entry in comparison.of(name)))}</td></tr>'
        for name in comparison.methods
    )
    return (
        '<section>\n<h2>Methods</h2>\n<div class="scroll"><table><thead><tr><th>method</th><th>what it does</th>'
        f'<th>source</th><th class="number">time for all ratios</th></tr></thead><tbody>{rows}</tbody></table></div>\n'
        "</section>"
    )
