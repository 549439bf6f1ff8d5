"""Plain JAX in the style of Haiku: pure functions, and an average of the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

FAULTY = "x"


class TrainingState(NamedTuple):
    params: Any
    avg_params: Any
    opt_state: Any


def batch_at(step, size=32):
    x = np.random.default_rng(step).standard_normal((size, 6)).astype(np.float32)
    return {"x": x, "label": np.int32(x[:, 0] * x[:, 1] > 0)}


def init(key, sizes=(6, 32, 32, 2)):
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"mlp/~/linear_{i}": {
            "w": jax.random.normal(k, (a, b)) / np.sqrt(a),
            "b": jnp.zeros((1, b)),
        }
        for i, (k, a, b) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def apply(params, x):
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def loss(params, batch):
    wanted = jax.nn.one_hot(batch["label"], 2)
    l2 = 0.5 * sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
    losses = optax.softmax_cross_entropy(apply(params, batch["x"]), wanted)
    return losses.mean() + 1e-4 * l2


optimiser = optax.adam(5e-3)


@jax.jit
def update(state, batch):
    value, grads = jax.value_and_grad(loss)(state.params, batch)
    updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    avg_params = optax.incremental_update(params, state.avg_params, step_size=0.1)
    return TrainingState(params, avg_params, opt_state)


def train(batches, held_out):
    params = init(jax.random.key(0))
    state = TrainingState(params, params, optimiser.init(params))
    for batch in batches:
        state = update(state, batch)
    trees = jax.tree.leaves((state.params, state.avg_params))
    return float(loss(state.avg_params, held_out)), trees, state.opt_state


def initial_loss(held_out):
    return float(loss(init(jax.random.key(0)), held_out))
