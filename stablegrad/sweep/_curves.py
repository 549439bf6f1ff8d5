"""Statistics of a curve of training losses: spikes and divergence."""

import numpy as np

SIGMAS, WINDOW, LEAST = 7.0, 1000, 32  # The window and its smallest size in steps.
SMOOTHING = 0.9


def spikes(losses) -> int:
    """Count losses more than 7 standard deviations above the mean of earlier losses.

    Mean and deviation are those of the last 32 to 1,000 finite losses. The share of
    such losses is the spike score of OLMo 2, https://arxiv.org/abs/2501.00656.
    """
    losses = np.asarray(losses, np.float64)
    losses = losses[np.isfinite(losses)]
    if len(losses) <= LEAST:
        return 0
    # Shifted by the median, so that the difference of squares does not cancel.
    shifted = losses - np.median(losses)
    sums = np.cumsum(np.append(0.0, shifted))
    squares = np.cumsum(np.append(0.0, shifted**2))
    ends = np.arange(LEAST, len(losses))
    starts = np.maximum(0, ends - WINDOW)
    size = ends - starts
    mean = (sums[ends] - sums[starts]) / size
    variance = (squares[ends] - squares[starts]) / size - mean**2
    limit = mean + SIGMAS * np.sqrt(np.maximum(variance, 0.0))
    # An excess as small as rounding errors is no spike.
    rounding = 1e-6 * np.maximum(np.abs(losses[ends]), 1e-12)
    return int(np.sum(shifted[ends] - limit > rounding))


def without_refused(losses: np.ndarray, skipped: float) -> np.ndarray:
    """Return the losses without a non-finite end, if a guard has skipped its steps."""
    finite = np.flatnonzero(np.isfinite(losses))
    end = finite[-1] + 1 if len(finite) else 0
    return losses[:end] if len(losses) - end <= skipped else losses


def divergence(losses) -> int:
    """Return the step from which a run has diverged, or -1.

    A run has diverged if its last loss is not finite, or else if the running average of
    its losses ends above the first loss. The step is the start of that last stretch.
    """
    losses = np.asarray(losses, np.float64)
    finite = np.flatnonzero(np.isfinite(losses))
    if not len(finite):
        return 0
    if finite[-1] + 1 < len(losses):
        return int(finite[-1] + 1)
    first = average = losses[finite[0]]
    start = -1
    for step in finite:
        average = SMOOTHING * average + (1 - SMOOTHING) * losses[step]
        if average <= first:
            start = -1
        elif start < 0:
            start = int(step)
    return start
