"""Runs of many steps, compiled once, for tests that look at every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import stablegrad as sg


def scan(tx, grads, params, values=None, apply=False):
    """Runs `tx` over `grads` (leading axis: step).

    Returns the final parameters and state, and what every step left behind:
    parameters, metrics, and the inner state. One step is compiled, which takes half
    the time of a loop of steps, and serves runs of any length.
    """
    steps = len(jax.tree.leaves(grads)[0])
    values = np.zeros(steps) if values is None else values
    xs = (grads, jnp.asarray(values, jnp.float32))
    step, carry = _step(tx, apply), (params, jax.jit(tx.init)(params))
    xs = xs if is_traced(xs) else jax.device_get(xs)
    rows = []
    for t in range(steps):
        carry, row = step(carry, jax.tree.map(lambda leaf, t=t: leaf[t], xs))
        rows.append(row if is_traced(row) else jax.device_get(row))
    trail, states = stack(rows)
    return *carry, (trail, sg.metrics(states), states.guarded_inner)


def stack(rows):
    """One tree of arrays with a leading axis of many trees."""
    put = jnp.stack if is_traced(rows) else np.stack
    return jax.tree.map(lambda *leaves: put(leaves), *rows)


def is_traced(tree):
    """Whether settings of a transformation, or all of a run, are under a trace."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@functools.lru_cache(64)
def _step(tx, apply):
    """Compiled once for each shape of the parameters."""

    @jax.jit
    def step(carry, xs):
        params, state = carry
        grad, value = xs
        if apply:
            params, state = sg.apply(tx, grad, state, params, value=value)
        else:
            updates, state = tx.update(grad, state, params, value=value)
            add = lambda p, u: (p + u).astype(p.dtype)
            params = jax.tree.map(add, params, updates)
        return (params, state), (params, state)

    return step


def of_norm(norms, size=2):
    """Gradients of the given norms: one leaf of `size` equal elements a step."""
    norms = jnp.asarray(norms, jnp.float32)
    return {"w": norms[:, None] * jnp.full((1, size), size**-0.5)}
