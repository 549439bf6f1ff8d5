"""The figure of a flight recorder: which layer, when, and what was done."""

import importlib
import itertools
from typing import Any

import numpy as np

from .._events import signal_of
from .._figure import BLUE, CYCLE, GREEN, ORANGE, PURPLE, RED, new_figure

COLOURS = {"skip": RED, "halt": "k", "back_off": ORANGE, "shorten": PURPLE}
OTHER = GREEN  # The colour of other kinds of events.
DECADES = 3.0  # Colours reach from 10^-3 to 10^3 times the median.
MOST_NAMES = 40  # Leaves that are named along the axis.


def draw(history) -> Any:
    """Draw a `History` as a `matplotlib.figure.Figure`."""
    leaves = len(history.leaves)
    ratios = [1.2 + 0.12 * min(leaves, MOST_NAMES), 1, 1.2, 0.6]
    figure, axes = new_figure(
        11,
        6 + 0.17 * min(leaves, MOST_NAMES),
        4,
        title="Gradient norm of each leaf by step, and what the guard did",
        sharex=True,
        height_ratios=ratios,
    )
    heat, loss, norm, rate = axes = axes[:, 0]
    image = heat.imshow(
        _relative(history.leaf_norms).T,
        aspect="auto",
        interpolation="nearest",
        cmap=_colours(),
        vmin=-DECADES,
        vmax=DECADES,
        extent=(*_edges(history.steps), leaves - 0.5, -0.5),
    )
    figure.colorbar(image, ax=heat, label="norm by its median, log10", pad=0.01)
    named = range(0, leaves, -(-leaves // MOST_NAMES) or 1)
    names = [history.leaves[i].replace("$", r"\$") for i in named]
    heat.set_yticks(named, names, fontsize="x-small")
    title = "black: not finite; marks above: events"
    heat.set_title(title, fontsize="medium", pad=10, loc="right")
    steps = history.steps
    loss.plot(steps, _finite(history.loss_value), color=BLUE)
    loss.set(ylabel="loss", yscale=_scale(history.loss_value))
    norm.plot(steps, _finite(history.grad_norm), color=BLUE, label="gradient norm")
    for name, limit, color in zip(
        history.limits, history.limits.values(), itertools.cycle(CYCLE[1:])
    ):
        ax = {"grad_norm": norm, "value": loss}.get(signal_of(name))
        if ax is not None and np.isfinite(limit).any():
            style = {"linestyle": "--", "linewidth": 1, "color": color}
            ax.plot(steps, _finite(limit), label=name, **style)
    norm.set(ylabel="norm", yscale=_scale(history.grad_norm))
    rate.plot(steps, history.lr_scale, color=BLUE)
    rate.set(ylabel="lr_scale", xlabel="step", ylim=(-0.05, 1.05))
    if not np.isfinite(history.loss_value).any():
        loss.text(0.5, 0.5, "no step was given `value=`", transform=loss.transAxes)
        loss.set_yticks([])
    _mark(history, axes)
    for ax in (loss, norm, heat):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="x-small", loc="upper left")
    return figure


def _mark(history, axes) -> None:
    """Mark each event that lies in these steps: above the heat map, behind curves."""
    first, last = history.steps[[0, -1]] if len(history.steps) else (0, -1)
    told = set()
    for event in history.events:
        if event.until < first or event.step > last:
            continue
        label = event.kind.replace("_", " ")
        span = (max(event.step, first) - 0.5, min(event.until, last) + 0.5)
        style = {"color": COLOURS.get(event.kind, OTHER), "linewidth": 0.6}
        name = None if label in told else label
        axes[0].axvspan(*span, ymin=1.0, ymax=1.03, clip_on=False, label=name, **style)
        for ax in axes[1:]:
            ax.axvspan(*span, alpha=0.35, **style)
        told.add(label)


def _relative(norms: np.ndarray) -> np.ndarray:
    """Return log10 of the norms over each leaf's median; nan where not finite."""
    logs = np.log10(np.maximum(_finite(norms), 1e-30))
    middle = np.ma.median(np.ma.masked_invalid(logs), axis=0)
    return logs - np.ma.filled(middle, 0.0)


def _finite(numbers: np.ndarray) -> np.ndarray:
    """Return the same, nan in place of inf, which Matplotlib leaves out."""
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _edges(steps: np.ndarray) -> tuple[float, float]:
    return (steps[0] - 0.5, steps[-1] + 0.5) if len(steps) else (-0.5, 0.5)


def _scale(numbers: np.ndarray) -> str:
    known = numbers[np.isfinite(numbers)]
    return "log" if known.size and known.min() > 0 else "linear"


def _colours() -> Any:
    """Return a colour map in which what is not finite is black."""
    colours = importlib.import_module("matplotlib").colormaps["coolwarm"]
    return colours.with_extremes(bad="black")
