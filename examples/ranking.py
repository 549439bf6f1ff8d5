"""Several training runs side by side: a ranked table, and a figure."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import style
from rich import box
from rich.table import Table

COLUMNS = (
    "run",
    "validation loss",
    "test accuracy",
    "epochs",
    "seconds",
    "skipped",
    "first rate",
    "rate scale",
)


@dataclasses.dataclass
class Result:
    """One run, as far as it has come; `epochs` has a row of numbers for each."""

    name: str
    rate: float  # At the beginning.
    seconds: float  # Before the first epoch.
    epochs: list[dict[str, Any]]
    test_accuracy: float = math.nan  # In [0, 1]; nan while it goes on.

    def score(self) -> float:
        """The validation loss after the last epoch; inf where it is nan."""
        loss = self.epochs[-1]["validation_loss"]
        return math.inf if math.isnan(loss) else loss


def ranked(results: list[Result]) -> Table:
    """The smallest validation loss first."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "run" else "right")
    for result in sorted(results, key=Result.score):
        last = result.epochs[-1]
        seconds = result.seconds + sum(row["seconds"] for row in result.epochs)
        unfinished = math.isnan(result.test_accuracy)
        guarded = last["skipped"] is not None
        table.add_row(
            result.name,
            f"{last['validation_loss']:.4f}",
            "-" if unfinished else f"{100 * result.test_accuracy:.2f} %",
            str(len(result.epochs)),
            f"{seconds:.0f}",
            str(last["skipped"]) if guarded else "-",
            f"{result.rate:.2g}",
            f"{last['rate_scale']:.3g}" if guarded else "-",
        )
    return table


def draw(results: list[Result], path: Path) -> None:
    """Losses, accuracy and learning rate after each epoch."""
    figure, axes = style.new_figure(
        10,
        8,
        3,
        title="The same network under each optimizer",
        sharex=True,
        height_ratios=(3, 3, 2),
    )
    axes = axes[:, 0]
    for result, color in zip(results, itertools.cycle(style.CYCLE)):
        look = {"color": color, "marker": "o", "markersize": 4}
        epochs = np.arange(1, len(result.epochs) + 1)
        column = lambda name, result=result: np.array(
            [row[name] for row in result.epochs], np.float64
        )
        axes[0].plot(epochs, column("train_loss"), ":", **look)
        axes[0].plot(epochs, column("validation_loss"), label=result.name, **look)
        axes[1].plot(epochs, 100 * column("validation_accuracy"), **look)
        axes[2].step(epochs, result.rate * column("rate_scale"), where="post", **look)
    for axis, label in zip(
        axes, ("loss (training :)", "validation accuracy in %", "rate"), strict=True
    ):
        axis.set_ylabel(label)
    axes[0].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend(loc="upper right", ncols=2)
    axes[2].set_xlabel("epoch")
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110)
