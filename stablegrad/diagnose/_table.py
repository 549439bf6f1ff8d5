"""A report as text of at most 100 columns, but for lines of code."""

import math
import textwrap
from typing import TYPE_CHECKING

from ._layers import Layer
from .rules import Verdict

if TYPE_CHECKING:
    from ._report import Report

WIDTH, NAME = 100, 26
MOST_EVENTS = 8
MARKS = {"note": "i", "warning": "!", "critical": "X"}
COLUMNS = (
    "signal",
    "gradient",
    "chi",
    "theory",
    "off",
    "alike",
    "branch",
    "upd/par",
)


def number(value: float) -> str:
    """Return at most seven characters; "" for nan."""
    if math.isnan(value):
        return ""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    if 1e-2 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def spoken(value: float) -> str:
    """Return the same in a sentence, where nan is a word."""
    return number(value) or "nan"


def share(value: float) -> str:
    """Return per cent; "" for nan."""
    return "" if math.isnan(value) else f"{100 * value:.0f}%"


def cells(layer: Layer) -> list[str]:
    """Return what the table shows of a layer."""
    return [
        number(layer.rms),
        number(layer.gradient_rms),
        number(layer.chi),
        number(layer.chi_theory),
        share(layer.saturated if layer.bounded else layer.dead),
        number(round(layer.alike, 2) + 0.0),  # Not -0.
        number(layer.branch),
        number(layer.update),
    ]


def remark(layer: Layer) -> str:
    """Return what is known of a layer that has no numbers of the usual kind."""
    if layer.kind == "attention":
        return f"largest logit {number(layer.logit)}, entropy {share(layer.entropy)}"
    if layer.kind == "router":
        load = f"busiest expert {number(layer.busiest)} times its share"
        return f"{load}, entropy {share(layer.entropy)}"
    return ""


def shortened(name: str, width: int = NAME) -> str:
    """Cut a name in front: its end tells more."""
    return name if len(name) <= width else "…" + name[-width + 1 :]


def shown_name(layer: Layer) -> str:
    """Return name and activation."""
    return f"{layer.name} {layer.activation}".strip()


def text(report: "Report") -> str:
    """Return the whole report."""
    facts = report.facts
    grave = report.causes
    head = f"loss {spoken(facts.loss)}, {len(report.layers)} layers, {summary(report)}"
    lines = [*wrapped(head, ""), ""]
    titles = "".join(f" {title:>8}" for title in COLUMNS)
    lines += [
        f"  {'layer, in order of depth':{NAME}}{titles}",
        "  " + "─" * (WIDTH - 2),
    ]
    marks = {}
    for verdict in reversed(report.verdicts):
        marks[verdict.layer] = MARKS[verdict.severity]
    for layer in report.layers:
        row = "".join(f" {cell:>8}" for cell in cells(layer))
        row = f"   {remark(layer)}" if remark(layer) else row
        mark = marks.get(layer.name, marks.get(layer.leaf, " ") if layer.leaf else " ")
        lines.append(f"{mark} {shortened(shown_name(layer)):{NAME}}{row}".rstrip())
    lines += ["", *wrapped(other_numbers(report), "")]
    for i, verdict in enumerate(report.verdicts, 1):
        lines += ["", *_verdict(i, verdict)]
    if not grave and report.layers:
        lines += ["", "Within usual limits: " + _asked(report)]
        lines[-1:] = wrapped(lines[-1], "")
    if facts.events:
        last = facts.events[-MOST_EVENTS:]
        which = f", the last {len(last)} of {len(facts.events)} events"
        which *= len(last) < len(facts.events)
        lines += ["", f"What happened in the run{which}:"]
        lines += [f"  {event}" for event in last]
    return "\n".join(lines)


def summary(report: "Report") -> str:
    """Return the counts of verdicts."""
    causes, rest = len(report.causes), len(report.verdicts) - len(report.causes)
    unseen = len(report.facts.unseen)
    blind = f", {unseen} parameter{'s' * (unseen != 1)} not seen" if unseen else ""
    if not report.layers:
        why = blind or ": does the loss take the batch as an argument?"
        return "no layer found" + why
    return _verdicts(causes, rest) + blind


def _verdicts(causes: int, rest: int) -> str:
    if not causes + rest:
        return "within usual limits"
    words = [f"{causes} finding{'s' * (causes != 1)}"] if causes else []
    words += [f"{rest} further"] if causes and rest else []
    words += [f"within usual limits, {rest} note{'s' * (rest != 1)}"] * (not causes)
    return " and ".join(words)


def _asked(report: "Report") -> str:
    found = {verdict.rule for verdict in report.verdicts}
    return ", ".join(rule.name for rule in report.asked if rule.name not in found) + "."


def other_numbers(report: "Report") -> str:
    """Return in a sentence what has no layer."""
    batch, training = report.facts.batch, report.facts.training
    parts = []
    if report.facts.unseen:
        names = ", ".join(report.facts.unseen)
        parts.append(
            f"not seen, since they are used inside a branch, a loop without a fixed "
            f"length or a function with its own derivative: {names}"
        )
    if batch.norms:
        parts.append(
            f"gradient noise scale {spoken(batch.noise_scale)} examples at a batch of "
            f"{batch.examples}"
        )
    if training is not None:
        if not math.isnan(training.b2):
            parts.append(
                f"b1 {training.b1:.4g}, b2 {training.b2:.6g} (remembers "
                f"{1 / max(1 - training.b2, 1e-9) * batch.examples:.3g} examples), "
                f"epsilon {spoken(training.epsilon)}"
            )
        if training.losses:
            first, last = training.losses[0], training.losses[-1]
            parts.append(
                f"{len(training.losses) - 1} steps: loss {spoken(first)} to "
                f"{spoken(last)}"
            )
    return "; ".join(parts) + "." if parts else ""


def _verdict(i: int, verdict: Verdict) -> list[str]:
    layer = f" {verdict.layer}" if verdict.layer else ""
    follows = f" (follows from {verdict.follows})" if verdict.follows else ""
    lines = [f"{i}. {verdict.severity}: {verdict.rule}{layer}{follows}"]
    lines += wrapped(verdict.finding, "   ")
    if verdict.follows:
        return lines
    lines += wrapped(f"limit:  {verdict.threshold} [{verdict.source}]", "   ")
    lines += wrapped(f"remedy: {verdict.remedy}", "   ")
    lines += wrapped(verdict.formula, " " * 11)
    return [*lines, f"           {verdict.code}"]


def wrapped(line: str, indent: str) -> list[str]:
    """Return lines of at most `WIDTH` columns."""
    return textwrap.wrap(
        line, WIDTH, initial_indent=indent,
        subsequent_indent=indent + "  " * bool(indent),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
