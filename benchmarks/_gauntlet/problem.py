"""A small real problem: linear regression on noisy batches, in three leaves.

Gradients are taken at the current parameters. Label noise dominates them, as late in
any training, so that healthy gradient norms are stationary, near 0.5, and spread by
about a fifth: below the usual fixed limit of 1.0, which is fair to those who use it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

FEATURES = {"first": 8, "second": 6}
OUTPUTS = 4
BATCH = 8
LABEL_NOISE = 0.18
LEVEL = 0.5  # The healthy gradient norm.
LEAVES = ("bias", "first", "second")  # In the order of `jax.tree.leaves`.
SIZE = (sum(FEATURES.values()) + 1) * OUTPUTS
START = 0.3  # Distance from the truth.


def truth() -> dict[str, np.ndarray]:
    """The weights that made the labels."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(0, 0.2, (width, OUTPUTS)) for name, width in FEATURES.items()
    }
    weights["bias"] = rng.normal(0, 0.2, (OUTPUTS,))
    return {name: weights[name].astype(np.float32) for name in LEAVES}


def start() -> dict[str, np.ndarray]:
    """The weights that training starts from, `START` away from the truth."""
    rng = np.random.default_rng(1)
    off = {name: rng.normal(size=leaf.shape) for name, leaf in truth().items()}
    length = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in off.values()))
    return {
        name: (leaf + START / length * off[name]).astype(np.float32)
        for name, leaf in truth().items()
    }


@functools.cache
def batches(steps: int, seed: int = 2) -> dict[str, np.ndarray]:
    """One batch a step: features and the label noise."""
    rng = np.random.default_rng(seed)
    sizes = {**FEATURES, "noise": OUTPUTS}
    drawn = {n: rng.normal(size=(steps, BATCH, wide)) for n, wide in sizes.items()}
    drawn["noise"] *= LABEL_NOISE
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def loss(params, batch) -> jax.Array:
    """Half the mean squared error."""

    def predict(weights):
        return sum(batch[name] @ weights[name] for name in FEATURES)

    off = {name: params[name] - leaf for name, leaf in truth().items()}
    error = predict(off) + jnp.broadcast_to(off["bias"], batch["noise"].shape)
    return 0.5 * jnp.mean(jnp.sum(jnp.square(error - batch["noise"]), axis=-1))


def norms(tree) -> jax.Array:
    """The norm of each leaf, in float32, right for every finite leaf."""
    return jnp.stack(
        [_norm(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree)]
    )


def _norm(leaf) -> jax.Array:
    top = jnp.max(jnp.abs(leaf))
    unit = jnp.where(jnp.isfinite(top) & (top > 0), top, 1.0)
    return unit * jnp.sqrt(jnp.sum(jnp.square(leaf / unit)))


def distances(params) -> jax.Array:
    """How far each leaf is from the truth."""
    return norms({name: params[name] - leaf for name, leaf in truth().items()})


def along(norm, dtype=jnp.float32):
    """A gradient of the given norm: every element the same."""
    element = jnp.asarray(norm * SIZE**-0.5, dtype)
    return {name: jnp.full(leaf.shape, element) for name, leaf in truth().items()}
