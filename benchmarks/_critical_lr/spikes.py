"""The observed rate: the smallest of a fine grid at which training first spikes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

RATIO, STEPS, LIMIT = 1.1, 20, 1.05  # The grid; how long to look; what is a spike.
LANES = 16
LOWEST = {"SGD": 1e-2, "momentum": 1e-2, "Adam": 1e-3}
HIGHEST = 1e4


@functools.partial(jax.jit, static_argnames=("loss_fn", "tx"))
def _peaks(loss_fn, tx, params, batch, rates):
    """The largest loss of 20 steps over the first one, for each of some rates."""

    def train(rate):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
            return (params, state), value

        start = params, tx.init(params)
        (last, _), values = jax.lax.scan(step, start, length=STEPS)
        return jnp.maximum(jnp.max(values), loss_fn(last, batch)) / values[0]

    return jax.vmap(train)(rates)


def first_spike(loss_fn, tx, params, batch, lowest: float) -> float:
    """The smallest rate of the grid with a loss above 1.05 of the first; inf if none.

    The grid starts at `lowest`, or lower by factors until training there is calm.
    """
    while spikes_at(loss_fn, tx, params, batch, lowest):
        lowest /= RATIO**LANES
    count = math.ceil(math.log(HIGHEST / lowest, RATIO))
    for begin in range(0, count, LANES):
        rates = lowest * RATIO ** np.arange(begin, begin + LANES)
        peaks = _peaks(loss_fn, tx, params, batch, jnp.float32(rates))
        spiked = ~(np.asarray(peaks) <= LIMIT)
        if spiked.any():
            return float(rates[np.argmax(spiked)])
    return math.inf


def spikes_at(loss_fn, tx, params, batch, rate: float) -> bool:
    """Whether training spikes at one rate."""
    rates = jnp.full(LANES, rate, jnp.float32)  # The same program as for the grid.
    return not float(_peaks(loss_fn, tx, params, batch, rates)[0]) <= LIMIT
