"""Tests for `stablegrad.apply`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from helpers.training import of_norm, scan

import stablegrad as sg

RTOL = 1e-6  # The fused step may round p + u once where two programs round twice.


def grads_with_faults(steps=60):
    rng = np.random.default_rng(0)
    grads = {
        "a": rng.normal(size=(steps, 3, 2)).astype(np.float32),
        "b": rng.normal(size=(steps, 4)).astype(np.float32),
    }
    grads["a"][10, 1, 1] = np.nan
    grads["b"][40] *= 1e20
    grads["a"][45] *= 30
    return grads


OPTIMIZERS = {
    "guarded adamw": sg.stabilize(optax.adamw(0.1)),
    "guarded momentum": sg.guard(
        optax.sgd(0.1, momentum=0.9), sg.clip(sg.zscore(2.5, per="leaf")), sg.skip()
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gives_what_update_and_apply_updates_give(name):
    tx = OPTIMIZERS[name]
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(4)}
    values = np.random.default_rng(1).normal(size=60)
    separate, state, _ = scan(tx, grads_with_faults(), params, values)
    fused, fused_state, _ = scan(tx, grads_with_faults(), params, values, apply=True)
    chex.assert_trees_all_close(fused, separate, rtol=RTOL)
    chex.assert_trees_all_close(fused_state, state, rtol=1e-5)
    assert sg.metrics(state)["skipped_steps"] >= 1


@functools.cache
def fused(name):
    return jax.jit(lambda g, s, p: sg.apply(OPTIMIZERS[name], g, s, p, value=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
@pytest.mark.parametrize("name", core(OPTIMIZERS, "guarded momentum"))
def test_a_rejected_step_returns_every_bit_as_it_was(name, bad):
    tx = OPTIMIZERS[name]
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(4)}
    step = fused(name)
    state = tx.init(params)
    for _ in range(30):
        params, state = step(params, state, params)
    grads = {"a": params["a"].at[0, 0].set(bad), "b": params["b"]}
    held, after = step(grads, state, params)
    chex.assert_trees_all_equal(held, params)
    chex.assert_trees_all_equal(after.guarded_inner, state.guarded_inner)
    assert sg.metrics(after)["skipped"]


def test_takes_any_other_optax_transformation():
    params = {"w": jnp.array([1.0, 2.0])}
    for tx in (optax.sgd(0.5), optax.chain(sg.guard(optax.sgd(0.5)), optax.scale(1.0))):
        new, _ = sg.apply(tx, params, tx.init(params), params, value=1.0)
        np.testing.assert_allclose(new["w"], [0.5, 1.0])


def test_parameters_keep_their_dtype():
    params = {"w": jnp.ones((4,), jnp.bfloat16)}
    tx = sg.guard(optax.sgd(0.1))
    new, _ = jax.jit(lambda p, s: sg.apply(tx, p, s, p))(params, tx.init(params))
    assert new["w"].dtype == jnp.bfloat16


def test_missing_params_is_an_error_that_shows_the_fix():
    tx = sg.stabilize(optax.sgd(0.1))
    params = of_norm([1.0])
    with pytest.raises(ValueError, match=r"needs the parameters.*\n.*tx.update\(grads"):
        sg.apply(tx, params, tx.init(params), None)


def test_a_rejected_step_keeps_even_the_sign_of_a_zero():
    tx = sg.guard(optax.sgd(0.1), sg.skip())
    params = {"w": jnp.array([-0.0])}
    step = jax.jit(lambda g, s, p: sg.apply(tx, g, s, p))
    held, _ = step({"w": jnp.array([jnp.nan])}, tx.init(params), params)
    assert np.signbit(held["w"][0])
