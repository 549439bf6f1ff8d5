"""Loss against learning rate: one panel a task, one line a method."""

import itertools
from pathlib import Path

import numpy as np
import style
from matplotlib.axes import Axes

from .rows import Table

# Methods are told apart by colour and marker, their kinds by width and dashes.
PEERS = {"clip": "-", "guard": (0, (5, 2)), "rate": (0, (1, 1.5))}
MARKERS = "osD^v"
FLOOR = 1e-4  # Losses on B reach zero, which a logarithm has no room for.


def _styles(tables: list[Table]) -> dict[str, dict]:
    """One style a method, the same in every panel."""
    kinds = {row.method: row.kind for data in tables for row in data.rows}
    peers = itertools.cycle((style.GREY, style.SKY, style.PURPLE, style.YELLOW))
    ours = itertools.cycle(
        zip(
            (style.BLUE, style.GREEN, style.RED, style.ORANGE, style.PURPLE),
            MARKERS,
            strict=True,
        )
    )
    styles = {}
    for method, kind in kinds.items():
        if kind == "bare":
            styles[method] = {"color": "black", "lw": 2.2, "zorder": 4}
        elif kind == "ours":
            colour, marker = next(ours)
            styles[method] = {
                "color": colour, "marker": marker, "ms": 4, "lw": 2.4, "zorder": 5,
            }  # fmt: skip
        else:
            styles[method] = {"color": next(peers), "ls": PEERS[kind], "lw": 1.2}
    return styles


def _panel(axes: Axes, data: Table, styles: dict[str, dict]) -> None:
    for row in data.rows:
        loss = np.maximum(row.scores.loss, FLOOR)
        axes.plot(data.rates, loss, label=row.method, **styles[row.method])
    axes.axhline(data.initial_loss, color="black", lw=0.6, ls=":")
    axes.set(xlabel="learning rate", xscale="log", yscale="log")
    axes.set_title(data.title, fontsize=9)
    if min(row.scores.loss.min() for row in data.rows) > 1:
        axes.set_yscale("linear")


def draw(tables: list[Table], path: Path) -> None:
    """Write the figure."""
    tables = [data for data in tables if data.rows]
    styles, columns = _styles(tables), min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure, grid = style.new_figure(
        max(3.6 * columns, 6),
        3.1 * lines + 1.6,
        lines,
        columns,
        title="Final loss at each learning rate (dotted: before training)",
    )
    panels = list(grid.flat)
    for axes, data in zip(panels, tables, strict=False):
        _panel(axes, data, styles)
    for axes in panels[len(tables) :]:
        axes.set_visible(False)
    for first in grid[:, 0]:
        first.set_ylabel("final loss")
    handles = {}
    for axes in panels:
        found, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    # Names need room even where there is a single panel.
    figure.legend(
        [handles[name] for name in styles],
        list(styles),
        loc="outside lower center",
        ncols=2 * columns,
        fontsize=7,
        frameon=False,
    )
    figure.savefig(path, dpi=85)
