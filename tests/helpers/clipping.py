"""Runs a clip of a chain over many gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from helpers.chunks import scan_in_chunks

PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(())}
SIZES = (6, 4, 1)


def gradients(steps, seed=0, sigma=0.3):
    """Healthy gradients of PARAMS with outliers, and a level that rises and falls."""
    rng = np.random.default_rng(seed)
    flat = rng.normal(size=(steps, sum(SIZES)))
    scale = rng.lognormal(0.0, sigma, size=(steps, 1))
    scale[steps // 3], scale[steps // 3 + 40] = 50.0, 6.0
    scale[steps // 2 : 3 * steps // 4] *= 4.0
    return (flat * scale / sum(SIZES) ** 0.5).astype(np.float32)


def tree(flat):
    """Rows of 11 numbers as gradients of PARAMS; works on one row and on many."""
    front = flat.shape[:-1]
    return {
        "a": flat[..., :6].reshape(*front, 2, 3),
        "b": flat[..., 6:10],
        "c": flat[..., 10],
    }


def flatten(tree):
    """Undoes `tree`, for many rows."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def leaf_norms(flat):
    """Norms of the three leaves of every row, in float64."""
    flat = np.asarray(flat, np.float64)
    bounds = np.cumsum((0, *SIZES))
    parts = [flat[:, i:j] for i, j in itertools.pairwise(bounds)]
    return np.stack([np.linalg.norm(part, axis=1) for part in parts], axis=1)


def packed(state):
    """The float32 and the int32 numbers of a clip, readings first."""
    (numbers,) = state.clip_numbers.values()
    return numbers


def run(tx, flat, params=PARAMS):
    """What comes out for every row of `flat`, and the last state."""
    program = functools.partial(_scan(tx), params)
    state, updates = scan_in_chunks(program, jax.jit(tx.init)(params), tree(flat))
    return flatten(updates), state


@functools.lru_cache(64)
def _scan(tx):
    """Compiled once for each number of steps."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    return jax.jit(lambda p, s, xs: jax.lax.scan(functools.partial(step, p), s, xs))
