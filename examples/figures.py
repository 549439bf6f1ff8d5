"""The figures of `schedules.py` and `structure.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import style


def draw_schedules(outcomes: dict[str, Any], kinds: dict[str, str], path: Path) -> None:
    """Rate, gradient norm and loss over the steps: a column a kind of schedule."""
    columns = list(dict.fromkeys(kinds.values()))
    figure, axes = style.new_figure(
        14,
        8,
        3,
        len(columns),
        title="The same network under each schedule",
        sharex=True,
        sharey="row",
    )
    for name, out in outcomes.items():
        column = columns.index(kinds[name])
        among = [other for other in kinds if kinds[other] == kinds[name]]
        color = style.CYCLE[among.index(name) % len(style.CYCLE)]
        for axis, values in zip(
            axes[:, column], (out.rates, out.norms, out.losses), strict=True
        ):
            inside = np.clip(np.where(np.isfinite(values), values, np.nan), 1e-5, 1e5)
            axis.plot(inside, color=color, label=name, linewidth=0.8)
    for column, kind in enumerate(columns):
        axes[0, column].set_title(kind)
        axes[2, column].set_xlabel("step")
        if axes[0, column].lines:
            axes[0, column].legend(loc="lower left")
    labels = ("learning rate", "gradient norm", "training loss")
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_yscale("log")
        axis.set_ylabel(label)
    figure.savefig(path, dpi=110)


def draw_layers(outcomes: dict[str, dict[str, Any]], path: Path) -> None:
    """The gradient norm over the layers, at the start and after training."""
    figure, axes = style.new_figure(
        4.5 * len(outcomes) + 1,
        8,
        2,
        len(outcomes),
        title="Gradient norm by layer, before and after training",
        sharey="row",
    )
    names = list(dict.fromkeys(name for found in outcomes.values() for name in found))
    for column, (title, networks) in enumerate(outcomes.items()):
        for axis, when in zip(axes[:, column], ("at_start", "at_end"), strict=True):
            for name, out in networks.items():
                norms = getattr(out, when)
                norms = np.clip(np.where(norms > 0, norms, np.nan), 1e-15, 1e12)
                again, place = divmod(names.index(name), len(style.CYCLE))
                look = {"color": style.CYCLE[place], "ls": "--" if again else "-"}
                layers = range(1, len(norms) + 1)
                axis.plot(layers, norms, label=name, marker=".", **look)
            axis.set_yscale("log")
            axis.locator_params(axis="x", integer=True)
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("layer")
    axes[0, 0].set_ylabel("gradient norm at the start")
    axes[1, 0].set_ylabel("gradient norm, last step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=90)
