"""The faults of the rescue example: when they come, and what they look like."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import style
from digits import Split


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


LOOKS = {  # Colour, and what the label says before the accuracy.
    "plain": (style.RED, "AdamW"),
    "usual": (style.ORANGE, "clip, apply_if_finite"),
    "unprobed": (style.GREEN, "stabilize"),
    "guarded": (style.BLUE, "stabilize, value_fn="),
    "reference": (style.GREY, "no faults"),
}
LEAST, MOST = 1e-4, 1e2  # Of the loss; values beyond are drawn at the edge.
SMOOTHED = 15  # Steps of the median over each.


def draw(
    histories: dict[str, list[dict]], scores: dict[str, str], plan: Plan, path: Path
) -> None:
    """Loss and learning-rate scale over the steps, each run named where it ends."""
    figure, ((losses,), (scales,)) = style.new_figure(
        10,
        6,
        rows=2,
        title=f"Same faults: AdamW {scores['plain']}, guarded {scores['guarded']}; "
        f"no faults: {scores['reference']}",
        sharex=True,
        height_ratios=(4, 1),
    )
    ends = {}
    for name, history in histories.items():
        color, label = LOOKS[name]
        values = np.array([seen["loss"] for seen in history], np.float64)
        seen_last = int(np.flatnonzero(np.isfinite(values))[-1])
        values = np.clip(np.where(np.isfinite(values), values, np.nan), LEAST, MOST)
        losses.plot(values, color=color, linewidth=0.6, alpha=0.25)
        smooth = [
            np.nanmedian(values[max(0, step - SMOOTHED + 1) : step + 1])
            for step in range(seen_last + 1)
        ]
        losses.plot(smooth, color=color, linewidth=1.8)
        text = f"{label}: {scores[name]}"
        if seen_last + SMOOTHED < len(values):
            losses.plot(seen_last, smooth[-1], "X", color=color, markersize=9)
            losses.annotate(
                f"{text}, nan from here on",
                (seen_last, smooth[-1]),
                xytext=(seen_last, smooth[-1] / 150),
                color=color,
                arrowprops={"arrowstyle": "-", "color": color, "relpos": (0, 1)},
            )
        else:
            ends[text] = (smooth[-1], color)
        if "lr_scale" in history[0] and name == "guarded":
            scales.plot([seen["lr_scale"] for seen in history], color=color)
    _name_ends(losses, ends, len(values))
    losses.set(yscale="log", ylabel="training loss", ylim=(LEAST, MOST))
    scales.set(
        yscale="log", ylabel="factor on\nthe rate", xlabel="step", xlim=(0, len(values))
    )
    for i, (name, (start, width)) in enumerate(spans(plan).items()):
        for axis in (losses, scales):
            axis.axvspan(start, start + max(width, 4), color=style.SHADE, zorder=0)
        place = (start, 0.98 - 0.06 * (i % 2))
        losses.annotate(name, place, xycoords=("data", "axes fraction"), va="top")
    losses.set_title("accuracy on test digits", loc="right", fontsize=9)
    figure.savefig(path, dpi=100)


def _name_ends(axis, ends: dict[str, tuple[float, str]], steps: int) -> None:
    """Writes a name beside the end of each line, none over another."""
    below = 0.0
    for text, (value, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        below = max(value, below * 2.2)
        axis.annotate(
            text,
            (steps, below),
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
            va="center",
            annotation_clip=False,
        )


def spans(plan: Plan) -> dict[str, tuple[int, int]]:
    """First step and length of each fault, by the name the figure shows."""
    return {
        "inputs x 1e20": (plan.huge_batch, 1),
        "nan": (plan.nan_batch, 1),
        "wrong labels": (plan.wrong_labels.start, len(plan.wrong_labels)),
        "3 nan": (plan.nan_burst.start, len(plan.nan_burst)),
        "high learning rate from here": (plan.high_rate, 0),
    }
