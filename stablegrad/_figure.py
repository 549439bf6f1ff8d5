"""One look for all figures; Matplotlib is loaded only when one is drawn.

The colours are those of Okabe and Ito, which most colour-blind people can tell apart.
The background is white, so a figure can be read on a light page and on a dark one.
"""

import importlib
from typing import Any

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F"
CYCLE = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY, YELLOW)
SHADE = "#EBEBEB"  # Behind the lines: when something happens.


def new_figure(
    width: float, height: float, rows=1, columns=1, title="", **subplots
) -> tuple[Any, Any]:
    """Return a `matplotlib.figure.Figure` and its (rows, columns) axes.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "`figure` needs Matplotlib: pip install 'stablegrad[report]'"
        ) from error
    size = {"figsize": (width, height)}
    figure = matplotlib.Figure(**size, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_prop_cycle(color=CYCLE)
        axis.tick_params(labelsize=9)
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    return figure, axes
