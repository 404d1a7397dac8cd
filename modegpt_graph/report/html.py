"""One HTML file that needs nothing else: no script, no font, no image from anywhere.

Every string from a model or a pattern goes through `escape`.
"""

from html import escape

from modegpt_graph.allocate.budget import PARAMETERS
from modegpt_graph.match.sites import Analysis, Site
from modegpt_graph.report import words
from modegpt_graph.report.bound_chart import bound_chart
from modegpt_graph.report.bounds import EXPLAINED, bound_series, violation_line, violations
from modegpt_graph.report.changes import asked_line, change_rows, search_line
from modegpt_graph.report.fold import SiteGroup, fold_sites, fold_unmatched
from modegpt_graph.report.outcome import CompressionOutcome, SiteOutcome
from modegpt_graph.report.ranks import rank_series
from modegpt_graph.report.style import STYLE, quoted, wide
from modegpt_graph.report.svg import rank_chart

NO_BREAK_HYPHEN = "\u2011"


def to_html(analysis: Analysis, outcome: CompressionOutcome | None = None) -> str:
    """The whole report as one document: header, outcome where there is one, sites, what was left alone, glossary."""
    name = escape(analysis.model.name)
    body = [_header(analysis, outcome)]
    if outcome is not None:
        body.append(_outcome(analysis, outcome))
    body += [_sites(analysis, outcome), _unmatched(analysis), _glossary(outcome)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} · modegpt-graph</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _header(analysis: Analysis, outcome: CompressionOutcome | None) -> str:
    model = analysis.model
    refused = sum(site.decomposition is None for site in analysis.sites)
    facts = [
        ("parameters", words.count(model.parameters), "" if outcome is None else "before compression"),
        ("in decoder-layer matrices", words.count(model.decoder_linear_parameters), ""),
        ("sites found", f"{len(analysis.sites):,}", f"{refused:,} cannot be made smaller" if refused else ""),
        ("coverage", words.percent(analysis.coverage), "of the decoder layers' matrices are in a site"),
    ]
    kind = "Analysis" if outcome is None else "Compression"
    cells = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for label, value, note in facts
    )
    return (
        f'<header>\n<p class="kind">{kind} by modegpt-graph</p>\n<h1>{escape(model.name)}</h1>\n'
        f'<p class="soft">{escape(model.architecture)}</p>\n<dl class="facts">{cells}</dl>\n</header>'
    )


def _outcome(analysis: Analysis, outcome: CompressionOutcome) -> str:
    reached = outcome.ratios
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{escape(dense)}</td>'
        f'<td class="number"><b>{escape(compressed)}</b></td><td class="number">{escape(change)}</td></tr>'
        for name, dense, compressed, change in change_rows(outcome)
    )
    share, asked = asked_line(outcome)
    matrices = "" if outcome.budget == "parameters" else f"{words.percent(reached.decoder_linear)} of {PARAMETERS}, "
    notes = [
        f"<b>{escape(share)}</b>{escape(asked)} went; that is {escape(matrices)}"
        f"{words.percent(reached.without_embeddings)} of all parameters without embeddings, "
        f"{words.percent(reached.all)} of all.",
        "" if outcome.search is None else escape(search_line(outcome.search)),
        f"Calibrated on {escape(words.sentence(outcome.calibration, start=False))} "
        f"{escape(words.sentence(words.method_line(outcome.preset, outcome.allocator, outcome.seed)))}",
    ]
    if outcome.fallback_reason:
        reason = escape(words.sentence(outcome.fallback_reason, start=False))
        notes.append(f'<span class="bad">Not the text asked for: {reason}</span>')
    if outcome.evaluation:
        notes.append(f"Perplexity and KL were measured on {escape(words.sentence(outcome.evaluation, start=False))}")
    if outcome.approximation:
        notes.append(escape(outcome.approximation))
    notes += [
        "<br>".join(map(escape, outcome.choices)),
        escape(outcome.counted or ""),
        escape(f"Reused: {' '.join(outcome.reused)}" if outcome.reused else ""),
    ]
    notes.append(escape(words.time_line(outcome.seconds, outcome.forward_passes)))
    charts = "".join(
        f'<h3>{escape(one.roles)} <span class="soft">{escape(one.span)}</span></h3>{wide(rank_chart(one))}'
        for one in rank_series(analysis, outcome)
    )
    return (
        '<section>\n<h2>What changed</h2>\n<div class="scroll"><table><thead><tr><th></th><th class="number">dense</th>'
        f'<th class="number">compressed</th><th class="number">change</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n"
        + "".join(f"<p>{note}</p>" for note in notes if note)
        + (f"\n<h2>Features kept, layer by layer</h2>\n{charts}" if charts else "")
        + _bounds(analysis, outcome)
        + "\n</section>"
    )


def _bounds(analysis: Analysis, outcome: CompressionOutcome) -> str:
    series = bound_series(analysis, outcome)
    if not series:
        return ""
    parts = [f"\n<h2>Error and bound</h2>\n<p>{escape(EXPLAINED)}</p>"]
    violated = violations(outcome)
    if violated:
        parts.append(f'<p class="bad"><b>{escape(violation_line(violated))}</b></p>')
    for one in series:
        loose = "" if one.looseness is None else f", bound / error {one.looseness}"
        said = f"proposition {one.proposition}{loose}"
        parts.append(f'<h3>{escape(one.roles)} <span class="soft">{escape(said)}</span></h3>{wide(bound_chart(one))}')
    return "".join(parts)


def _sites(analysis: Analysis, outcome: CompressionOutcome | None) -> str:
    groups = fold_sites(analysis.sites)
    if not groups:
        return "<section>\n<h2>Sites</h2>\n<p>No pattern matched anything in this model.</p>\n</section>"
    by_id = {} if outcome is None else {site.id: site for site in outcome.sites}
    heads = "".join(f"<span>{head}</span>" for head in ("", "layers", "site", "type", "commutant", "decision"))
    rows = "\n".join(_group(group, by_id) for group in groups)
    return f'<section>\n<h2>Sites</h2>\n<div class="heads">{heads}</div>\n{rows}\n</section>'


def _group(group: SiteGroup, outcomes: dict[str, SiteOutcome]) -> str:
    site = group.example
    tone = "good" if site.decomposition else "bad"
    times = f' <span class="soft">×{group.per_layer}</span>' if (group.per_layer or 0) > 1 else ""
    layers = escape(group.layers).replace("-", NO_BREAK_HYPHEN)
    summary = (
        f'<span class="layers">{layers}{times}</span><span class="what"><b>{escape(words.roles_line(site))}</b> '
        f'<span class="soft">{escape(site.pattern)}</span></span>'
        f'<span class="type">{escape(words.type_line(site))}</span>'
        f'<span>{escape(words.commutant_line(site))}</span><span class="{tone}">{escape(words.decision(site))}</span>'
        f'<span class="why">{quoted(words.sentence(site.reason))}</span>'
    )
    between = ", ".join(site.between) or "nothing"
    facts = (
        f"<p>Between the matrices: <code>{escape(between)}</code>. {escape(words.capital(words.size_line(site)))} "
        f"in each site. {escape(words.capital(words.certificate_line(site.certificate)))}."
        f"{f' Variant: {escape(site.variant)}.' if site.variant not in ('', 'plain') else ''}</p>"
    )
    return (
        f'<details class="site"><summary>{summary}</summary><div class="inside">{facts}'
        f'<div class="scroll">{_detail(group, outcomes)}</div></div></details>'
    )


def _detail(group: SiteGroup, outcomes: dict[str, SiteOutcome]) -> str:
    kept = any(site.id in outcomes for site in group.sites)
    heads = ["layer", *group.example.roles, "probe error", *(["kept", "relative error", "bound"] if kept else [])]
    rows = "".join(f"<tr>{_detail_row(site, outcomes.get(site.id), kept)}</tr>" for site in group.sites)
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _detail_row(site: Site, outcome: SiteOutcome | None, kept: bool) -> str:
    error = site.certificate.max_error
    cells = ["" if site.layer is None else str(site.layer)]
    for role in site.roles.values():
        rows = ", ".join(f"{start:,}-{stop - 1:,}" for start, stop in role.rows)
        cells.append(f'<code>{escape(role.parameter)}</code> <span class="soft">rows {rows}</span>')
    cells.append("not probed" if error is None else words.figure(error))
    if kept and outcome is not None:
        cells.append(f"{outcome.rank:,} of {outcome.full_rank:,}")
        cells.append("not measured" if outcome.relative_error is None else words.figure(outcome.relative_error))
        cells.append("none" if outcome.bound is None else words.figure(outcome.bound))
    elif kept:
        cells += ["all", "", ""]
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _unmatched(analysis: Analysis) -> str:
    groups = fold_unmatched(analysis.unmatched)
    if not groups:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(group.parameter)}</code></td><td>{escape(group.example.nearest_pattern or 'none')}</td>"
        f"<td>{quoted(words.sentence(group.example.reason))}</td></tr>"
        for group in groups
    )
    return (
        '<section>\n<h2>Left alone, no pattern took them</h2>\n<div class="scroll"><table><thead><tr><th>parameter</th>'
        f"<th>nearest pattern</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table></div>\n</section>"
    )


def _glossary(outcome: CompressionOutcome | None) -> str:
    told = {word: text for word, text in words.GLOSSARY.items() if outcome is not None or word not in words.OUTCOMES}
    entries = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in told.items())
    return f'<section>\n<h2>Words</h2>\n<dl class="words">{entries}</dl>\n</section>'
