"""Equinox: a filtered step over a model with functions among its leaves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

FAULTY = "x"


def batch_at(step, size=32):
    x = np.random.default_rng(step).standard_normal((size, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(2 * x[:, :1]) + x[:, 1:2]}


def create():
    return eqx.nn.MLP(3, 1, 32, 2, activation=jax.nn.silu, key=jax.random.key(0))


@eqx.filter_jit
def loss_fn(model, batch):
    return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)


optim = optax.adamw(1e-2)


@eqx.filter_jit
def make_step(model, opt_state, batch):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optim.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state


def train(batches, held_out):
    model = create()
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    for batch in batches:
        model, opt_state = make_step(model, opt_state, batch)
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return float(loss_fn(model, held_out)), leaves, opt_state


def initial_loss(held_out):
    return float(loss_fn(create(), held_out))
