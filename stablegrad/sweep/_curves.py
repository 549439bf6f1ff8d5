"""What a curve of training losses tells: spikes, and where it was lost for good."""

import numpy as np

SIGMAS, WINDOW, LEAST = 7.0, 1000, 32  # Steps.
SMOOTHING = 0.9


def spikes(losses) -> int:
    """How many losses lie 7 standard deviations above the mean of those before.

    Of the last 1,000 before, and of 32 at least; losses that are not finite are no
    spikes, and are left out of the mean. As OLMo 2 counts them,
    https://arxiv.org/abs/2501.00656, whose score is the share of such steps.
    """
    losses = np.asarray(losses, np.float64)
    losses = losses[np.isfinite(losses)]
    if len(losses) <= LEAST:
        return 0
    # About one of the values, so that the squares do not cancel.
    shifted = losses - np.median(losses)
    sums = np.concatenate([[0.0], np.cumsum(shifted)])
    squares = np.concatenate([[0.0], np.cumsum(shifted**2)])
    ends = np.arange(LEAST, len(losses))
    starts = np.maximum(0, ends - WINDOW)
    size = ends - starts
    mean = (sums[ends] - sums[starts]) / size
    variance = (squares[ends] - squares[starts]) / size - mean**2
    limit = mean + SIGMAS * np.sqrt(np.maximum(variance, 0.0))
    # A spread of nothing but rounding is none.
    floor = 1e-6 * np.maximum(np.abs(losses[ends]), 1e-12)
    return int(np.sum(shifted[ends] - limit > floor))


def divergence(losses) -> int:
    """The step from which a run was lost for good, or -1.

    The start of the last stretch, if the run ends in it, of losses that are not finite;
    or else, of those whose running average is above the first. Losses that are not
    finite, but are followed by others that are, count as survived.
    """
    losses = np.asarray(losses, np.float64)
    finite = np.flatnonzero(np.isfinite(losses))
    if not len(finite):
        return 0
    if finite[-1] + 1 < len(losses):
        return int(finite[-1] + 1)
    first = average = losses[finite[0]]
    lost = -1
    for step in finite:
        average = SMOOTHING * average + (1 - SMOOTHING) * losses[step]
        if average <= first:
            lost = -1
        elif lost < 0:
            lost = int(step)
    return lost
