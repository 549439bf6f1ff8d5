"""Small programs for what the main one has not: float16, Adam, accumulation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import faults, problem
from .simulate import Seen, compiled

ACCUMULATED = 4
BAD_MICRO_BATCH = 102  # In the middle of an accumulation.
MICRO_BATCHES = 240
HALF_STEPS = 120
ZERO_STEPS = 20
ADAM_STEPS = 300
ADAM_FAULT = 150


def _runs(tx, params, several: list, gradient: Callable, moves=True) -> list[Seen]:
    """Scans over each of `several`; `gradient(params, x)` gives loss and gradient."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, x):
        params, state = carry
        loss, grads = gradient(params, x)
        updates, state = tx.update(grads, state, params, value=loss)
        if moves:
            params = optax.apply_updates(params, updates)
        far, flag = problem.distances(params), jnp.zeros((), bool)
        seen = Seen(problem.norms(grads), problem.norms(updates), far, flag)
        return (params, state), seen

    def whole(params, xs):
        return jax.lax.scan(step, (params, tx.init(params)), xs)[1]

    params = jax.tree.map(jnp.asarray, params)
    program = compiled(whole, params, several[0])
    seen = [program(params, xs) for xs in several]
    return [Seen(*(np.asarray(x, np.float64) for x in one)) for one in seen]


def _prescribed(params, norm):
    """A gradient of the given norm in the parameters' dtype, with an ordinary loss."""
    del params
    return jnp.ones(()), problem.along(norm, jnp.float16)


def _half() -> dict[str, np.ndarray]:
    return {name: leaf.astype(np.float16) for name, leaf in problem.start().items()}


def half_large(make: Callable) -> dict[str, Seen]:
    """float16 gradients whose elements are about 300."""
    norms = np.float32(faults.large_norms(faults.STEPS)[:HALF_STEPS])
    (seen,) = _runs(make(optax.sgd(1.0)), _half(), [norms], _prescribed, moves=False)
    return {"half_large": seen}


def half_zero(make: Callable) -> dict[str, Seen]:
    """float16 Adam: gradients of exactly zero, then healthy ones."""
    norms = np.float32(faults.lognormal(3 * ZERO_STEPS, faults.SIGMA, seed=5))
    norms[:ZERO_STEPS] = 0
    (seen,) = _runs(make(optax.adam(1e-3)), _half(), [norms], _prescribed)
    return {"half_zero": seen}


def accumulated(make: Callable) -> dict[str, Seen]:
    """One nan micro-batch; the method sees every micro-batch."""
    factors = np.ones(MICRO_BATCHES, np.float32)
    factors[BAD_MICRO_BATCH] = np.nan
    inner = optax.MultiSteps(optax.sgd(1e-2), ACCUMULATED).gradient_transformation()
    xs = (problem.batches(MICRO_BATCHES), factors)
    (seen,) = _runs(make(inner), problem.start(), [xs], _spoilt)
    return {"accumulated": seen}


def adam(make: Callable) -> dict[str, Seen]:
    """Adam without a fault, and with one gradient of 1e20."""
    healthy = np.ones(ADAM_STEPS, np.float32)
    spoilt = healthy.copy()
    spoilt[ADAM_FAULT] = 2e21
    several = [(problem.batches(ADAM_STEPS), f) for f in (healthy, spoilt)]
    clean, seen = _runs(make(optax.adam(2e-3)), problem.start(), several, _spoilt)
    return {"adam_clean": clean, "adam_overflow": seen}


def _half() -> dict[str, np.ndarray]:
    return {name: leaf.astype(np.float16) for name, leaf in problem.start().items()}


def _prescribed(params, norm):
    """A gradient of the given norm in float16, with an ordinary loss."""
    del params
    return jnp.ones(()), problem.along(norm, jnp.float16)


def _spoilt(params, x):
    batch, factor = x
    loss, grads = jax.value_and_grad(problem.loss)(params, batch)
    # A nan batch spoils the loss as well; an overflow of the gradient does not.
    bad = jnp.where(jnp.isfinite(factor), 1.0, factor)
    return loss * bad, jax.tree.map(lambda g: g * factor, grads)


PROGRAMS = {
    "half_large": half_large,
    "half_zero": half_zero,
    "accumulated": accumulated,
    "adam": adam,
}
