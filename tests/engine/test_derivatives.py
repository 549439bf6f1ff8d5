"""Derivatives through guarded steps, as in learning to learn."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import stablegrad as sg

START = {"w": jnp.array([2.0, 3.0]), "b": jnp.array([0.5])}
GUARDS = {
    "stabilize": sg.stabilize,
    "per leaf": lambda tx: sg.stabilize(tx, per="leaf"),
    "z-scores": lambda tx: sg.guard(
        tx, sg.clip(sg.zscore(3.0)), sg.back_off(sg.zscore(6.0, of="value"))
    ),
}


def loss_fn(params):
    return jnp.sum((params["w"] - 1) ** 2) + jnp.sum(params["b"] ** 2)


def loss_after_training(params, rate, guarded):
    tx = optax.with_extra_args_support(guarded(optax.sgd(rate, momentum=0.9)))
    state = tx.init(params)
    for _ in range(3):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    return loss_fn(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", GUARDS)
def test_through_healthy_steps_they_are_those_of_the_bare_optimizer(name):
    derive = jax.jit(jax.grad(loss_after_training, (0, 1)), static_argnums=2)
    bare = derive(START, 0.1, lambda tx: tx)
    chex.assert_trees_all_close(derive(START, 0.1, GUARDS[name]), bare, rtol=1e-5)
