"""Loss against learning rate: one panel a task, one line a method."""

import itertools
from pathlib import Path

import matplotlib
import numpy as np

from .rows import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Told apart in grey by width, marker and dashes; in colour by hue as well.
PEERS = {
    "clip": ("#4f7cb5", "#a3bfe3"),
    "guard": ("#8a8a8a",),
    "rate": ("#3f8f68", "#9fcfb4"),
}
OURS = ("#b2182b", "#d6604d", "#762a83", "#e08214", "#8c510a")
MARKERS = "osD^v"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
FLOOR = 1e-4  # Losses on B reach zero, which a logarithm has no room for.


def _styles(tables: list[Table]) -> dict[str, dict]:
    """One style a method, the same in every panel."""
    kinds = {row.method: row.kind for data in tables for row in data.rows}
    peers = {
        kind: itertools.cycle(itertools.product(colours, DASHES))
        for kind, colours in PEERS.items()
    }
    ours = itertools.cycle(zip(OURS, MARKERS, strict=True))
    styles = {}
    for method, kind in kinds.items():
        if kind == "bare":
            styles[method] = {"color": "black", "lw": 2.2, "zorder": 4}
        elif kind == "ours":
            colour, marker = next(ours)
            styles[method] = {
                "color": colour, "marker": marker, "ms": 4, "lw": 2.6, "zorder": 5,
            }  # fmt: skip
        else:
            colour, dashes = next(peers[kind])
            styles[method] = {"color": colour, "ls": dashes, "lw": 0.9}
    return styles


def _panel(axes: Axes, data: Table, styles: dict[str, dict]) -> None:
    for row in data.rows:
        loss = np.maximum(row.scores.loss, FLOOR)
        axes.plot(data.rates, loss, label=row.method, **styles[row.method])
    axes.axhline(data.initial_loss, color="black", lw=0.6, ls=":")
    axes.set(title=data.title, xlabel="learning rate", xscale="log", yscale="log")
    if min(row.scores.loss.min() for row in data.rows) > 1:
        axes.set_yscale("linear")
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def draw(tables: list[Table], path: Path) -> None:
    """Writes the figure, at 200 dots an inch."""
    tables = [data for data in tables if data.rows]
    styles, columns = _styles(tables), min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        squeeze=False,
        figsize=(3.6 * columns, 3.1 * lines + 1.4),
        layout="constrained",
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
    figure.savefig(path, dpi=200)
    plt.close(figure)
