"""The profile by depth: signal forward, gradient backward, verdicts marked."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._figure import BLUE, GREEN, new_figure
from ._layers import Layer
from ._table import shortened

if TYPE_CHECKING:
    from ._report import Report

COLOURS = {"note": "#6b7280", "warning": "#b45309", "critical": "#b91c1c"}  # Of text.
SIGNAL, GRADIENT = BLUE, GREEN


def is_drawn(layer: Layer) -> bool:
    """Return whether a layer's values and gradients are measured."""
    return layer.kind not in ("attention", "router")


def shown_places(layers: Sequence[Layer]) -> dict[str, int]:
    """Place layers among those that are drawn; attention lies at the one before it."""
    places, last = {}, -1
    for layer in layers:
        last += is_drawn(layer)
        places[layer.name] = max(last, 0)
    return places


def profile(report: "Report") -> Any:
    """Draw it."""
    layers = list(filter(is_drawn, report.layers))
    places = list(range(len(layers)))
    width = max(7.0, 0.28 * len(layers) + 2.0)
    title = f"Values and gradients by depth, at a loss of {report.loss:.4g}"
    figure, ((upper,), (lower,)) = new_figure(width, 5.6, 2, title=title, sharex=True)
    rows = (
        (upper, [layer.rms for layer in layers], SIGNAL, "RMS of values"),
        (lower, [layer.gradient_rms for layer in layers], GRADIENT, "RMS of gradients"),
    )
    for axes, values, colour, label in rows:
        positive = [v if v > 0 and math.isfinite(v) else math.nan for v in values]
        axes.plot(places, positive, "o-", color=colour, lw=1.4, ms=3.5)
        if any(v == v for v in positive):
            axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.grid(True, axis="y", color="#e5e7eb", lw=0.6)
    names = shown_places(report.layers)
    marked = [v for v in report.verdicts if v.layer in names and not v.follows]
    for i, verdict in enumerate(marked):
        place, colour = names[verdict.layer], COLOURS[verdict.severity]
        for axes in (upper, lower):
            axes.axvspan(place - 0.4, place + 0.4, color=colour, alpha=0.15, lw=0)
        height = 1.02 + 0.09 * (i % 3)
        upper.text(
            place, height, verdict.rule, color=colour, ha="center", fontsize=8,
            transform=upper.get_xaxis_transform(),
        )  # fmt: skip
    lower.set_xticks(places, [shortened(x.name, 22) for x in layers])
    lower.tick_params(axis="x", rotation=60, labelsize=7)
    for label in lower.get_xticklabels():
        label.set_parse_math(False)  # A name may hold dollars.
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")
    return figure
