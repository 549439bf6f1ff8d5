"""Scores of a method over learning rates.

The LR sensitivity of Wortsman et al. (2023), https://arxiv.org/abs/2309.14322, is

    LRS = mean over rates of ( min(loss, l_0) - l* )

with l_0 the loss before training, which also replaces a loss that is not finite, and l*
the method's lowest loss over the rates.
"""

from typing import NamedTuple

import numpy as np

WITHIN = 0.02  # Loss above the best that is inside of the band.
CLIFF = 0.1  # Loss above the best that is beyond the cliff.
TRIVIAL = 0.01  # Smallest gain on the trivial loss, as a share of it.
DEAD = 0.5  # Share of dead units that is flagged.


class Mean(NamedTuple):
    """Mean over seeds, and its standard error; nan for one seed."""

    mean: float
    error: float


class Scores(NamedTuple):
    """Scores of one method; arrays have the shape (rates,)."""

    loss: np.ndarray  # Mean over seeds of min(loss, l_0).
    broken: np.ndarray  # Number of seeds whose loss is not finite.
    accuracy: np.ndarray  # Mean over seeds.
    sensitivity: Mean
    normalised: Mean  # LRS / (l_0 - l*), in [0, 1].
    best: float  # Lowest `loss`.
    best_rate: float
    band: float  # Width in decades of the rates around the best within WITHIN of it.
    cliff: float  # Lowest rate above the best that is more than CLIFF off, or nan.
    trivial: np.ndarray  # Whether a constant predictor is as good for some seed.
    dead: np.ndarray  # Mean share of dead units.


def capped(loss, initial) -> np.ndarray:
    """Return min(loss, l_0), or l_0 if the loss is not finite."""
    return np.where(np.isfinite(loss), np.minimum(loss, initial), initial)


def before_training(evaluated, train) -> np.ndarray:
    """Return l_0 of each run, shape (rates, seeds); nan if nothing was ever finite.

    It is the first evaluated loss, or else the first finite loss of training: a guard
    may have skipped the first batch. A run without one has that of another rate or
    seed.

    Args:
        evaluated: Shape (rates, seeds, evaluations).
        train: Shape (rates, seeds, steps).
    """
    finite = np.isfinite(train)
    first = np.take_along_axis(train, finite.argmax(-1)[..., None], -1)[..., 0]
    initial = np.where(np.isfinite(evaluated[..., 0]), evaluated[..., 0], first)
    for axis in (0, None):
        largest = np.ma.masked_invalid(initial).max(axis, keepdims=True)
        initial = np.where(np.isfinite(initial), initial, np.ma.filled(largest, np.nan))
    return initial


def mean(values) -> Mean:
    """Return the mean and the standard error."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return Mean(float(values.mean()), float(error))


def score(rates, trivial_loss: float, curves) -> Scores:
    """Score a method from (initial loss, final loss, accuracy, dead) of each seed."""
    initial, final, accuracy, dead = np.asarray(curves, np.float64).swapaxes(0, 1)
    kept = capped(final, initial)
    lowest = kept.min(axis=1)
    sensitivity = (kept - lowest[:, None]).mean(axis=1)
    gain = initial.max(axis=1) - lowest
    gain = np.where(gain > 0, gain, np.nan)
    loss = kept.mean(axis=0)
    best = int(loss.argmin())
    outside = np.flatnonzero(~(loss <= loss.min() + WITHIN))
    low = max(outside[outside < best], default=-1) + 1
    high = min(outside[outside > best], default=len(loss)) - 1
    beyond = np.flatnonzero(loss > loss.min() + CLIFF)
    known = np.isfinite(trivial_loss)
    enough = trivial_loss - (TRIVIAL * abs(trivial_loss) if known else 0.0)
    return Scores(
        loss=loss,
        broken=np.sum(~np.isfinite(final), axis=0),
        accuracy=accuracy.mean(axis=0),
        sensitivity=mean(sensitivity),
        normalised=mean(sensitivity / gain),
        best=float(loss[best]),
        best_rate=float(rates[best]) if np.isfinite(loss[best]) else np.nan,
        band=float(np.log10(rates[high] / rates[low])),
        cliff=float(min((rates[i] for i in beyond if i > best), default=np.nan)),
        trivial=np.any(~(final < enough), axis=0),
        dead=dead.mean(axis=0),
    )
