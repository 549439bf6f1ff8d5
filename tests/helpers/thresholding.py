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
    groups = table.shape[1]
    state, (limit, exceeded) = _run(threshold, groups)(threshold.init(groups), table)
    shape = signals.shape
    return np.reshape(limit, shape), np.reshape(exceeded, shape), state


@functools.lru_cache(64)
def _run(threshold, groups):
    """Compiled once for each number of steps."""
    scope = Scope(independent(groups))

    def step(state, signal):
        word = judge(threshold, state, signal, scope)
        return learn(threshold, state, word), (word.limit, word.exceeded)

    return jax.jit(lambda state, xs: jax.lax.scan(step, state, xs))


def lognormal(steps, sigma=0.2, level=1.0, seed=0):
    """Norms as training has them: healthy, stationary, all positive."""
    return level * np.random.default_rng(seed).lognormal(0.0, sigma, size=steps)
