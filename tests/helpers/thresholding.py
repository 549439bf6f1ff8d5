"""Runs a threshold alone over a sequence of signals."""

import functools

import jax
import numpy as np

from helpers.chunks import scan_in_chunks
from stablegrad.granularity._groups import independent
from stablegrad.thresholds._base import Scope, judge, learn


def limits(threshold, signals):
    """The limits that each step meets, and whether it exceeds them.

    `signals` has shape (steps,) or (steps, groups); so have the results. Also returns
    the final state.
    """
    shape = np.shape(signals)
    words, state = said(threshold, signals)
    return np.reshape(words.limit, shape), np.reshape(words.exceeded, shape), state


def said(threshold, signals):
    """What a threshold says of each step, and the final state."""
    signals = np.asarray(signals, np.float32)
    table = signals if signals.ndim == 2 else signals[:, None]
    groups = table.shape[1]
    state = jax.jit(threshold.init, static_argnums=0)(groups)
    state, words = scan_in_chunks(_compiled(threshold, groups), state, table)
    return words, state


def judged(threshold, table):
    """What a threshold, maybe traced, says of each step, and the final state.

    `table` has shape (steps, groups).
    """
    groups = table.shape[1]
    state, words = _scan(threshold, groups, threshold.init(groups), table)
    return words, state


def _scan(threshold, groups, state, table):
    grouping = independent(groups)

    def step(state, signal):
        limit = threshold.limit(state, Scope(grouping))
        word = judge(threshold, signal, limit, grouping)
        return learn(threshold, state, word), word

    return jax.lax.scan(step, state, table)


@functools.lru_cache(64)
def _compiled(threshold, groups):
    """Compiled once for each number of steps."""
    return jax.jit(functools.partial(_scan, threshold, groups))


def lognormal(steps, sigma=0.2, level=1.0, seed=0):
    """Norms as training has them: healthy, stationary, all positive."""
    return level * np.random.default_rng(seed).lognormal(0.0, sigma, size=steps)
