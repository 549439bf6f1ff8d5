"""How much a method's result depends on the learning rate it was given.

LR sensitivity is that of Wortsman et al. (2023), https://arxiv.org/abs/2309.14322:
with l_0 the loss before training and l* the method's own best over the grid,

    LRS = mean over rates of ( min(loss, l_0) - l* ),

where a loss that is not finite counts as l_0.
"""

from typing import NamedTuple

import numpy as np

WITHIN = 0.02  # Of the best loss: the usable band.
CLIFF = 0.1  # Above the best loss.
TRIVIAL = 0.01  # Share of the trivial loss that must be gained on it.
DEAD = 0.5  # Share of units that never fire.


class Mean(NamedTuple):
    """A mean over seeds, and its standard error: nan of one seed."""

    mean: float
    error: float


class Scores(NamedTuple):
    """One row of the table: arrays have one entry a rate."""

    loss: np.ndarray  # Mean over seeds of the capped losses.
    broken: np.ndarray  # Seeds whose loss is not finite.
    accuracy: np.ndarray  # Mean over seeds.
    sensitivity: Mean
    normalised: Mean  # LRS / (l_0 - l*), in [0, 1].
    best: float  # Lowest of `loss`.
    best_rate: float
    band: float  # Decades around the best rate whose loss is within WITHIN of it.
    cliff: float  # Lowest rate above the best that is more than CLIFF off, or nan.
    trivial: np.ndarray  # Whether a constant predictor is as good, in some seed.
    dead: np.ndarray  # Mean share of dead units.


def capped(loss, initial) -> np.ndarray:
    """min(loss, l_0), and l_0 where the loss is not finite."""
    loss, initial = np.asarray(loss, np.float64), np.asarray(initial, np.float64)
    return np.where(np.isfinite(loss), np.minimum(loss, initial), initial)


def sensitivity(loss, initial) -> float:
    """LR sensitivity of one seed."""
    kept = capped(loss, initial)
    return float(np.mean(kept - kept.min()))


def normalised(loss, initial) -> float:
    """The same as a share of what training gains at best; nan if that is nothing."""
    gain = float(np.max(initial) - capped(loss, initial).min())
    return sensitivity(loss, initial) / gain if gain > 0 else np.nan


def band(loss, rates) -> float:
    """Decades from the lowest to the highest rate of the run around the best."""
    near, best = loss <= loss.min() + WITHIN, int(loss.argmin())
    low = high = best
    while low > 0 and near[low - 1]:
        low -= 1
    while high < len(loss) - 1 and near[high + 1]:
        high += 1
    return float(np.log10(rates[high] / rates[low]))


def cliff(loss, rates) -> float:
    """Lowest rate above the best one where the loss is lost; nan if there is none."""
    lost = (loss > loss.min() + CLIFF) & (np.arange(len(loss)) > loss.argmin())
    return float(rates[lost.argmax()]) if lost.any() else np.nan


def mean(values) -> Mean:
    """Mean and standard error."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return Mean(float(values.mean()), float(error))


def score(rates, trivial_loss: float, curves) -> Scores:
    """The scores of one method on one task, from one curve a seed."""
    initial, final, accuracy, dead = (
        np.stack([np.asarray(x, np.float64) for x in field])
        for field in zip(*curves, strict=True)
    )
    kept = capped(final, initial)
    loss = kept.mean(axis=0)
    return Scores(
        loss=loss,
        broken=np.sum(~np.isfinite(final), axis=0),
        accuracy=accuracy.mean(axis=0),
        sensitivity=mean([sensitivity(*x) for x in zip(final, initial, strict=True)]),
        normalised=mean([normalised(*x) for x in zip(final, initial, strict=True)]),
        best=float(loss.min()),
        best_rate=float(rates[loss.argmin()]),
        band=band(loss, rates),
        cliff=cliff(loss, rates),
        trivial=np.any(~(final < (1 - TRIVIAL) * trivial_loss), axis=0),
        dead=dead.mean(axis=0),
    )
