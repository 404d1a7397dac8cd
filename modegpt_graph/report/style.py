"""The look of the HTML report: system fonts, one accent, light and dark."""

import re
from html import escape


def quoted(text: str) -> str:
    """A text as HTML, what it has in backquotes as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def wide(chart: str) -> str:
    """A chart that is moved sideways where the window is too narrow to read it."""
    return f'<div class="scroll chart">{chart}</div>'


STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d2126; --soft: #626a73; --line: #e2e4e6; --wash: #f4f5f5;
  --accent: #1f6f8b; --good: #2b7a4b; --bad: #b3402f; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191d; --ink: #e4e6e8; --soft: #98a1aa; --line: #2d3238;
  --wash: #1e2227; --accent: #6bb7d0; --good: #77c596; --bad: #ec8d7c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 1.75rem; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.1rem; font-weight: 650; }
h3 { margin: 1.25rem 0 .25rem; font-size: .95rem; font-weight: 600; }
p { margin: .4rem 0; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.kind { color: var(--soft); font-size: .85rem; letter-spacing: .02em; margin: 0 0 .35rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: 1px; margin: 1.5rem 0 0;
  border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.facts div { box-shadow: 0 0 0 1px var(--line); padding: .75rem 1rem; }
.facts + p, .scroll + p { margin-top: 1rem; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: .1rem 0 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.facts small { display: block; color: var(--soft); font-weight: 400; font-size: .8rem; }
details.site { border-top: 1px solid var(--line); }
details.site:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; display: grid; grid-template-columns: 1rem 5.5rem 1fr 4.5rem 7rem 6rem; gap: .25rem 1rem;
  align-items: baseline; padding: .7rem .25rem; list-style: none; }
summary::-webkit-details-marker { display: none; }
summary { grid-template-rows: auto 1fr; }
summary::before { content: "▸"; color: var(--soft); }
details[open] > summary::before { content: "▾"; }
summary:hover { background: var(--wash); }
summary::before { grid-area: 1 / 1; } summary .layers { grid-area: 1 / 2 / span 2 / auto; }
summary .what { overflow-wrap: anywhere; } summary b { font-weight: 600; }
summary .why { grid-column: 3 / -1; color: var(--soft); font-size: .92rem; }
.inside { padding: .25rem .25rem 1.25rem 2.25rem; }
.heads { display: grid; grid-template-columns: 1rem 5.5rem 1fr 4.5rem 7rem 6rem; gap: 1rem; padding: 0 .25rem .4rem;
  color: var(--soft); font-size: .82rem; }
.scroll { overflow-x: auto; }
.inside td, .inside th { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; font-size: .82rem; text-align: left; white-space: nowrap; }
th, td { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.ranks { width: 100%; height: auto; display: block; }
.ranks text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.ranks .grid { stroke: var(--line); } .ranks .full { fill: var(--wash); } .ranks .kept { fill: var(--accent); }
.ranks .hit { fill: transparent; }
.bounds { width: 100%; height: auto; display: block; }
.bounds text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.bounds .grid { stroke: var(--line); }
.bounds .error { color: var(--accent); } .bounds .bound { color: var(--soft); }
.bounds .band { fill: currentColor; opacity: .14; }
.bounds .middle { fill: none; stroke: currentColor; stroke-width: 2; }
.bounds .bound .middle { stroke-dasharray: 6 4; } .bounds circle { fill: currentColor; opacity: .65; }
.bounds text.name { fill: currentColor; }
dl.words { display: grid; grid-template-columns: 7rem 1fr; gap: .5rem 1rem; margin: 0; font-size: .92rem; }
dl.words dt { font-weight: 600; } dl.words dd { margin: 0; color: var(--soft); }
@media (max-width: 44rem) { summary { grid-template: none / 1rem auto auto 1fr; } .heads { display: none; }
  summary .layers { grid-area: 1 / 2 / auto / -1; } .chart svg { min-width: 38rem; }
  .scroll:not(.chart) td:first-child { min-width: 5.5rem; }
  th, td { padding-right: .6rem; }
  .type { grid-column: 2; }
  summary .what, summary .why { grid-column: 2 / -1; } dl.words { grid-template-columns: 1fr; gap: .1rem; }
  dl.words dd { margin-bottom: .6rem; } }
@media print { details.site { break-inside: avoid; } body { padding: 0; } }
"""
