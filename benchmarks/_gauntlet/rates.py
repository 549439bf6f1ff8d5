"""Rates: what each method does to healthy steps, shifts and outliers, in numbers."""

from typing import NamedTuple

import numpy as np

from .criteria import usual
from .faults import (
    FREQUENT_EVERY,
    HEALTHY,
    LONG,
    ONSET,
    OUTLIER_EVERY,
    SHIFTS,
    SIGMA,
    STATIONARY,
    outliers,
)
from .problem import LEVEL
from .simulate import Seen

QUIET = 20  # Steps in a row that count as recovery.


class Rates(NamedTuple):
    """The measured rates of one method."""

    touched: dict[str, float]  # Share of healthy steps shrunk or skipped, by sigma.
    recovery: dict[str, int | None]  # Steps, by shift; None: never.
    caught: float  # Share of outliers at a factor below 0.9 of the usual one.
    frequent_caught: float  # The same where they come on one step in 50.
    halved: float  # Share that lost half of their excess at least.
    factor: float  # Mean factor on outliers, against the usual one.


def measure(long: dict[str, Seen]) -> Rates:
    """Reads the long runs."""
    planted = np.exp(6 * SIGMA)
    relative = _on_outliers(long, "outliers", OUTLIER_EVERY)
    frequent = _on_outliers(long, "frequent", FREQUENT_EVERY)
    return Rates(
        {str(sigma): _touched(long, sigma) for sigma in STATIONARY},
        {
            f"{way}_{factor}": _recovery(long[f"shift_{way}_{factor}"])
            for way in ("up", "down")
            for factor in SHIFTS
        },
        float(np.mean(relative < 0.9)),
        float(np.mean(frequent < 0.9)),
        float(np.mean(relative * planted <= 1 + (planted - 1) / 2)),
        float(np.mean(relative)),
    )


def _on_outliers(long: dict[str, Seen], name: str, every: int) -> np.ndarray:
    """Return the factor on each planted outlier, against the usual one."""
    runs = [seen for key, seen in long.items() if key.startswith(name)]
    return np.concatenate(
        [seen.factor[outliers(len(seen.factor), every)] / usual(seen) for seen in runs]
    )


def _touched(long: dict[str, Seen], sigma: float) -> float:
    factors = [
        seen.factor[HEALTHY.start :]
        for name, seen in long.items()
        if name.startswith(f"stationary_{sigma}_")
    ]
    return float(np.mean(np.concatenate(factors) < 0.999))


def _recovery(seen: Seen) -> int | None:
    """Steps from a shift to the first of `QUIET` in a row that pass."""
    passed = seen.factor[ONSET:] / usual(seen) > 0.9
    for step in range(len(passed) - QUIET + 1):
        if passed[step : step + QUIET].all():
            return step
    return None


LEGEND = f"""\
Gradients of prescribed norms, lognormal around {LEVEL}, parameters held, SGD.

- healthy touched: share of steps shrunk (factor below 0.999) or skipped, by the spread
  sigma of the log-norms; two runs, without the first {HEALTHY.start} steps.
- recovery: steps from a lasting shift, at step {ONSET} and sigma {SIGMA}, to the first
  of {QUIET} in a row at a factor above 0.9 of the usual one; never: not within this run
  ({LONG:,} steps, fewer with --quick).
- outliers: six sigma, {np.exp(6 * SIGMA):.1f} times the level, every 200th step.
  caught: factor below 0.9 of the usual one; halved: half of the excess removed at
  least; factor: the mean, against the usual one. caught, one in 50: the same where
  they come every 50th step, which tells what a method takes for usual."""
