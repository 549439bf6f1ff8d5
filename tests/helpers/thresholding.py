"""Runs a threshold alone over a sequence of signals, in one scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from stablegrad.granularity._groups import independent
from stablegrad.thresholds._base import Scope, judge, learn


def limits(threshold, signals):
    """The limits that each step meets, and whether it exceeds them.

    `signals` has shape (steps,) or (steps, groups); so have the results. Also returns
    the final state.
    """
    signals = jnp.asarray(signals, jnp.float32)
    table = signals if signals.ndim == 2 else signals[:, None]
    words, state = _compiled(threshold)(table)
    shape = signals.shape
    return np.reshape(words.limit, shape), np.reshape(words.exceeded, shape), state


def judged(threshold, table):
    """What a threshold, maybe traced, says of each step, and the final state.

    `table` has shape (steps, groups).
    """
    grouping = independent(table.shape[1])

    def step(state, signal):
        limit = threshold.limit(state, Scope(grouping))
        word = judge(threshold, signal, limit, grouping)
        return learn(threshold, state, word), word

    state, words = jax.lax.scan(step, threshold.init(table.shape[1]), table)
    return words, state


@functools.lru_cache(64)
def _compiled(threshold):
    """Compiled once for each shape of a table."""
    return jax.jit(functools.partial(judged, threshold))


def lognormal(steps, sigma=0.2, level=1.0, seed=0):
    """Norms as training has them: healthy, stationary, all positive."""
    return level * np.random.default_rng(seed).lognormal(0.0, sigma, size=steps)
