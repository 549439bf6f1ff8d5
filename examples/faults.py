"""The faults of the rescue example: when they come, and what they look like."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from digits import Split
from matplotlib.figure import Figure


class Plan(NamedTuple):
    """Which step sees which fault; all in steps, counted from 0."""

    huge_batch: int
    nan_batch: int
    wrong_labels: range
    nan_burst: range
    high_rate: int

    @classmethod
    def over(cls, steps: int) -> "Plan":
        """Spreads the faults over a run of `steps` steps."""
        at = lambda share: int(share * steps)
        return cls(
            huge_batch=at(0.05),
            nan_batch=at(0.15),
            wrong_labels=range(at(0.25), at(0.25) + max(1, min(15, steps // 40))),
            nan_burst=range(at(0.5), at(0.5) + 3),
            high_rate=at(0.65),
        )


def batches(
    train: Split, steps: int, batch_size: int, seed: int, plan: Plan | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same batches for every run, with the plan's faults if there is one."""
    order = np.random.default_rng(seed)
    mistakes = np.random.default_rng(seed + 1)
    for step in range(steps):
        rows = order.integers(0, len(train.labels), batch_size)
        images, labels = train.images[rows], train.labels[rows]
        if plan is not None:
            if step == plan.nan_batch or step in plan.nan_burst:
                images = np.full_like(images, np.nan)
            if step == plan.huge_batch:
                images = images * np.float32(1e20)
            if step in plan.wrong_labels:
                labels = mistakes.integers(0, 10, labels.shape).astype(np.int32)
        yield images, labels


def draw(histories: dict[str, list[dict]], plan: Plan, path: Path) -> None:
    """Loss, gradient norm and learning-rate scale over the steps, skips marked."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    colors = dict(zip(histories, ("C3", "C1", "C2", "C0", "0.6"), strict=True))
    for name, history in histories.items():
        style = {"color": colors[name], "label": name, "linewidth": 1}
        for axis, key in ((axes[0], "loss"), (axes[1], "grad_norm")):
            values = np.array([seen[key] for seen in history], np.float64)
            values = np.clip(np.where(np.isfinite(values), values, np.nan), 1e-4, 1e4)
            axis.plot(values, **style)
            dead = np.flatnonzero(np.isfinite(values))
            if len(dead) and dead[-1] + 1 < len(values):
                axis.plot(dead[-1], values[dead[-1]], "x", color=colors[name])
        if "lr_scale" in history[0]:
            axes[2].plot([seen["lr_scale"] for seen in history], **style)
            skips = [step for step, seen in enumerate(history) if seen["skipped"]]
            axes[2].plot(skips, np.full(len(skips), 1.15), "|", color=colors[name])
    for axis, label in zip(
        axes, ("training loss", "gradient norm", "lr_scale, skips |"), strict=True
    ):
        axis.set_yscale("log")
        axis.set_ylabel(label)
        for start, width in spans(plan).values():
            axis.axvspan(start, start + max(width, 2), color="0.9", zorder=0)
    for name, (start, _) in spans(plan).items():
        axes[0].annotate(name, (start, 1.02), xycoords=("data", "axes fraction"))
    axes[1].legend(loc="upper left", ncols=5)
    axes[2].set_xlabel("step (values beyond 1e-4 to 1e4 are drawn at the edge)")
    figure.savefig(path, dpi=110)


def spans(plan: Plan) -> dict[str, tuple[int, int]]:
    """First step and length of each fault, by the name the figure shows."""
    return {
        "inputs x 1e20": (plan.huge_batch, 1),
        "nan": (plan.nan_batch, 1),
        "wrong labels": (plan.wrong_labels.start, len(plan.wrong_labels)),
        "3 nan": (plan.nan_burst.start, len(plan.nan_burst)),
        "high learning rate from here": (plan.high_rate, 0),
    }
