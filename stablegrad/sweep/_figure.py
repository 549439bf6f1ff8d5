"""Training curves, and final loss against learning rate."""

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _checks

if TYPE_CHECKING:
    from ._result import Comparison, Row


def draw(result: "Comparison", most: int) -> Any:
    """A `matplotlib.figure.Figure` of the best `most` candidates."""
    _checks.require_count("most", most)
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "`figure` needs Matplotlib: pip install 'stablegrad[report]'"
        ) from error
    figure = figure_module.Figure(figsize=(12, 5), layout="constrained")
    curves, rates = figure.subplots(1, 2)
    for i, row in enumerate(result.rows[:most]):
        style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        rate = row.scores.best_rate
        label = row.name if np.isnan(rate) else f"{row.name}, {rate:.2g}"
        curves.plot(*_curve(row), label=label, **style)
        if len(row.rates) > 1:
            rates.plot(row.rates, row.scores.loss, "o", markersize=3, **style)
            rates.plot(row.rates, row.scores.loss, **style)
            best = int(row.scores.loss.argmin())
            rates.plot(
                row.rates[best], row.scores.loss[best], "*", markersize=11, **style
            )
        else:
            rates.axhline(row.scores.loss[0], **style)
    judged = "validation loss" if result.validated else "training loss"
    curves.set(xlabel="step", ylabel=judged)
    rates.set(
        xlabel="learning rate",
        xscale="log",
        ylabel="final loss; that before training where it is larger",
    )
    lowest = [row.scores.loss.min() for row in result.rows[:most]]
    if lowest and min(lowest) > 0:
        curves.set_yscale("log")
        rates.set_yscale("log")
    if result.rows:
        curves.legend(fontsize="small", title="candidate, best learning rate")
    return figure


def _curve(row: "Row") -> tuple[np.ndarray, np.ndarray]:
    """Evaluated losses at the best rate, mean over the seeds that have one."""
    losses = row.validation[int(row.scores.loss.argmin())]
    finite = np.isfinite(losses)
    count = finite.sum(axis=0)
    total = np.where(finite, losses, 0.0).sum(axis=0)
    known = count > 0
    return row.steps[known], total[known] / count[known]
