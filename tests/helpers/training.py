"""Runs of many steps, compiled once, for tests that look at every step."""

import functools

import jax
import jax.numpy as jnp

import stablegrad as sg


def scan(tx, grads, params, values=None, apply=False):
    """Runs `tx` over `grads` (leading axis: step).

    Returns the final parameters and state, and what every step left behind:
    parameters, metrics, and the inner state.
    """
    steps = len(jax.tree.leaves(grads)[0])
    values = jnp.zeros(steps) if values is None else jnp.asarray(values, jnp.float32)
    (params, state), (trail, states) = _run(tx, apply)(
        (params, tx.init(params)), (grads, values)
    )
    return params, state, (trail, sg.metrics(states), states.guarded_inner)


@functools.lru_cache(64)
def _run(tx, apply):
    """Compiled once for each number of steps."""

    def step(carry, xs):
        params, state = carry
        grad, value = xs
        if apply:
            params, state = sg.apply(tx, grad, state, params, value=value)
        else:
            updates, state = tx.update(grad, state, params, value=value)
            params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        return (params, state), (params, state)

    return jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))


def of_norm(norms, size=2):
    """Gradients of the given norms: one leaf of `size` equal elements a step."""
    norms = jnp.asarray(norms, jnp.float32)
    return {"w": norms[:, None] * jnp.full((1, size), size**-0.5)}
