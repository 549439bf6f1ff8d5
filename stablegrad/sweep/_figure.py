"""Figure of a comparison: training curves, and final loss against learning rate."""

from typing import Any

import numpy as np

from .. import _checks
from .._figure import CYCLE, new_figure

DASHES = ("-", "--", ":", "-.")  # Of the candidates beyond each round of colours.


def draw(result, most: int) -> Any:
    """Draw the best `most` candidates as a `matplotlib.figure.Figure`."""
    _checks.require_count("most", most)
    figure, ((curves, rates),) = new_figure(12, 6.5, 1, 2)
    rows = result.rows[:most]
    for i, row in enumerate(rows):
        again, place = divmod(i, len(CYCLE))
        style = {"color": CYCLE[place], "linestyle": DASHES[again % len(DASHES)]}
        rate, loss = row.scores.best_rate, row.scores.loss
        best = int(loss.argmin())
        label = row.name if np.isnan(rate) else f"{row.name}, {rate:.2g}"
        curve = np.ma.masked_invalid(row.validation[best]).mean(axis=0)
        known = ~np.ma.getmaskarray(curve)
        curves.plot(row.steps[known], curve.compressed(), label=label, **style)
        if len(row.rates) > 1:
            rates.plot(row.rates, loss, "o", markersize=3, **style)
            rates.plot(row.rates, loss, **style)
            rates.plot(rate, loss[best], "*", markersize=11, **style)
        else:
            rates.axhline(loss[0], **style)
    judged = "validation loss" if result.validated else "training loss"
    curves.set(xlabel="step", ylabel=judged)
    curves.set_title("Each candidate at its best learning rate", loc="left")
    rates.set(
        xlabel="learning rate",
        xscale="log",
        ylabel=f"final {judged}, at most that before training",
    )
    rates.set_title("What each learning rate gives; star: the best one", loc="left")
    if rows and min(row.scores.best for row in rows) > 0:
        curves.set_yscale("log")
        rates.set_yscale("log")
    if rows:
        left_out = len(result.rows) - len(rows)
        rest = f"; not drawn, as they end higher: {left_out}" if left_out else ""
        title = f"candidate, best learning rate{rest}"
        figure.legend(
            fontsize="small", title=title, loc="outside lower center", ncols=2
        )
    if not any(len(row.rates) > 1 for row in rows):
        rates.set_axis_off()
        rates.set_title("")
    return figure
