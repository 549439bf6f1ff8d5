"""Whether a method did harm: its runs against the bare ones, seed by seed."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

TOLERATED = 0.01  # Of what bare gains from start to end.
CONFIDENCE = 0.95


class Verdict(NamedTuple):
    """Differences are positive where the method is worse, in units of bare's gain."""

    loss: float  # Mean over seeds of what is lost; inf if a run is not finite.
    half_width: float  # Of the interval of that mean; inf for a single seed.
    harmed: bool
    helped: bool  # The same rule with the signs reversed.


def gain(start, bare, higher: bool) -> float:
    """What bare gains from start to end, on average over seeds; positive if it does."""
    difference = float(np.mean(np.asarray(bare) - np.asarray(start)))
    return difference if higher else -difference


def judge(start, bare, method, higher: bool) -> Verdict:
    """Judges by the t-interval of the paired differences.

    Harmed: the mean difference exceeds `TOLERATED` of bare's gain, and its interval
    excludes 0. A run that ends non-finite where bare is finite is harm by itself.
    """
    bare, method = (np.asarray(x, np.float64) for x in (bare, method))
    whole = gain(start, bare, higher)
    if not np.isfinite(method).all():
        return Verdict(math.inf, math.inf, bool(np.isfinite(bare).all()), False)
    worse = (bare - method if higher else method - bare) / whole
    mean, seeds = float(worse.mean()), worse.size
    half = math.inf
    if seeds > 1:
        t = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
        half = float(t * worse.std(ddof=1) / math.sqrt(seeds))
    return Verdict(
        mean,
        half,
        harmed=mean > TOLERATED and mean - half > 0,
        helped=mean < -TOLERATED and mean + half < 0,
    )
