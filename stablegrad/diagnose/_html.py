"""A report as one page of HTML, without scripts or outside references."""

import math
from html import escape
from typing import TYPE_CHECKING

from . import _table
from ._figure import COLOURS, GRADIENT, SIGNAL, is_drawn, shown_places

if TYPE_CHECKING:
    from ._report import Report

STYLE = """
:root { color-scheme: light dark; --ink: #111827; --paper: #ffffff; --line: #d1d5db;
  --soft: #6b7280; --box: #f9fafb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --paper: #111827;
  --line: #374151; --soft: #9ca3af; --box: #1f2937; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .5rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 500; } .wide { overflow-x: auto; }
.questions td { white-space: normal; }
section.verdict { border-left: 4px solid; padding: .4rem 1rem; margin: 1rem 0;
  background: var(--box); } .verdict h3 { margin: .2rem 0; font-size: 1rem; }
dl { display: grid; grid-template-columns: 5.5rem 1fr; margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
"""


def page(report: "Report") -> str:
    """Return the page."""
    summary = escape(_table.summary(report))
    verdicts = "".join(map(_verdict, report.verdicts))
    events = "".join(f"<li>{escape(str(e))}</li>" for e in report.facts.events)
    events = f"<h2>What happened in the run</h2><ul>{events}</ul>" if events else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>stablegrad: {summary}</title><style>{STYLE}</style>"
        f"<h1>Loss {_table.spoken(report.loss)}, {len(report.layers)} layers: "
        f"{summary}</h1>{verdicts}"
        f"<h2>By depth</h2>{_profile(report)}"
        f'<div class="wide">{_layers(report)}</div>'
        f"<p>{escape(_table.other_numbers(report))}</p>{events}"
        f"<h2>What was asked</h2>{_questions(report)}</html>\n"
    )


def _verdict(verdict) -> str:
    colour = COLOURS[verdict.severity]
    title = f"{verdict.severity}: {verdict.rule} {verdict.layer}".strip()
    rows = {
        "limit": verdict.threshold,
        "measured": ", ".join(
            f"{name.replace('_', ' ')} {_table.number(float(value))}"
            for name, value in verdict.evidence.items()
            if not math.isnan(value)
        ),
        "source": verdict.source,
    }
    if verdict.follows:
        rows = {"because": f"follows from {verdict.follows}", **rows}
    listed = "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in rows.items())
    code = lambda text: f"<code>{escape(text)}</code>"
    if not verdict.follows:
        listed += f"<dt>remedy</dt><dd>{escape(verdict.remedy)}<br>"
        listed += f"{code(verdict.formula)}<br>{code(verdict.code)}</dd>"
    return (
        f'<section class="verdict" style="border-color:{colour}"><h3>{escape(title)}'
        f"</h3>{escape(verdict.finding)}<dl>{listed}</dl></section>"
    )


def _layers(report: "Report") -> str:
    head = "".join(f"<th>{title}</th>" for title in ("layer", *_table.COLUMNS))
    rows = []
    for layer in report.layers:
        cells = "".join(f"<td>{cell}</td>" for cell in _table.cells(layer))
        if remark := escape(_table.remark(layer)):
            cells = f'<td colspan="{len(_table.COLUMNS)}">{remark}</td>'
        rows.append(f"<tr><td>{escape(_table.shown_name(layer))}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _questions(report: "Report") -> str:
    found = dict.fromkeys((rule.name for rule in report.rules), "not looked at")
    found |= dict.fromkeys((rule.name for rule in report.asked), "within usual limits")
    found |= {v.rule: v.severity for v in reversed(report.verdicts)}
    rows = "".join(
        f"<tr><td>{escape(rule.question)}</td><td>{found[rule.name]}</td></tr>"
        for rule in report.rules
    )
    return f'<table class="questions">{rows}</table>'


def _profile(report: "Report") -> str:
    """Draw the RMS of values and of gradients by depth, on one logarithmic scale."""
    layers = list(filter(is_drawn, report.layers))
    series = {
        ("values", SIGNAL): [layer.rms for layer in layers],
        ("gradients", GRADIENT): [layer.gradient_rms for layer in layers],
    }
    logs = {
        key: [math.log10(v) if v > 0 and math.isfinite(v) else None for v in values]
        for key, values in series.items()
    }
    known = [v for values in logs.values() for v in values if v is not None]
    if len(layers) < 2 or not known:
        return ""
    low, high = math.floor(min(known)), math.ceil(max(known))
    high = max(high, low + 1)
    width, height, left = 900, 260, 50
    at = lambda i: left + i * (width - left - 10) / (len(layers) - 1)
    y = lambda v: 10 + (high - v) * (height - 30) / (high - low)
    parts = []
    for tick in range(low, high + 1, max(1, (high - low) // 6)):
        parts.append(
            f'<line x1="{left}" x2="{width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            'stroke="currentColor" stroke-opacity=".15"/>'
            f'<text x="0" y="{y(tick) + 4:.1f}">1e{tick}</text>'
        )
    places = shown_places(report.layers)
    for verdict in report.verdicts:
        if verdict.layer in places and not verdict.follows:
            x, colour = at(places[verdict.layer]), COLOURS[verdict.severity]
            parts.append(
                f'<rect x="{x - 6:.1f}" y="10" width="12" height="{height - 30}" '
                f'fill="{colour}" fill-opacity=".25"><title>{escape(verdict.finding)}'
                "</title></rect>"
            )
    for column, ((name, colour), values) in enumerate(logs.items()):
        drawn = [(i, at(i), y(v)) for i, v in enumerate(values) if v is not None]
        line = " ".join(f"{a:.1f},{b:.1f}" for _, a, b in drawn)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>'
            f'<text x="{left + 10 + 110 * column}" y="{height - 4}" '
            f'style="fill:{colour}">RMS of {name}</text>'
        )
        for place, a, b in drawn:
            title = (
                f"{layers[place].name}: {_table.number(series[name, colour][place])}"
            )
            parts.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}">'
                f"<title>{escape(title)}</title></circle>"
            )
    view = f'viewBox="0 0 {width} {height}"'
    return f'<svg {view} role="img">{"".join(parts)}</svg>'
