"""One look for all figures: colours that most colour-blind people can tell apart.

They are those of Okabe and Ito; grey is for what is compared with. The background is
white, so a figure can be read on a light page and on a dark one.
"""

from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F"
CYCLE = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY, YELLOW)
SHADE = "#EBEBEB"  # Behind the lines: when something happens.


def sheet(width: float, height: float, rows=1, columns=1, title="", **subplots):
    """A figure and its axes, without the lines that carry nothing."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_prop_cycle(color=CYCLE)
        axis.tick_params(labelsize=9)
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    return figure, axes
