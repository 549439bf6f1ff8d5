"""Modules, settings among the parameters, constants in the root, odd losses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import stablegrad as sg

X = jax.random.normal(jax.random.key(0), (16, 4))
BATCH = (X, jnp.sin(X[:, 0]))


def quadratic(params, batch):
    return 0.5 * jnp.sum(batch * params**2)


@pytest.mark.slow
def test_sharpness_of_a_callable_equinox_module_is_that_of_its_arrays():
    model = eqx.nn.Linear(4, 1, key=jax.random.key(1))
    loss = lambda model, batch: jnp.mean(
        (jax.vmap(model)(batch[0])[:, 0] - batch[1]) ** 2
    )
    leaves, structure = jax.tree.flatten(model)
    flat = lambda leaves, batch: loss(structure.unflatten(leaves), batch)
    tx = optax.adam(1e-3)
    whole = sg.sharpness(loss, model, BATCH, tx=tx)
    assert whole.largest == pytest.approx(
        sg.sharpness(flat, leaves, BATCH, tx=tx).largest, rel=1e-4
    )


@pytest.mark.slow
def test_a_float_beside_arrays_is_a_constant():
    class Scaled(eqx.Module):
        w: jax.Array
        scale: float

    def loss(model, batch):
        return jnp.mean((model.scale * (batch[0] @ model.w) - batch[1]) ** 2)

    model = Scaled(jnp.ones(4), 0.1)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    own = lambda arrays, batch: loss(eqx.combine(arrays, rest), batch)
    found = sg.critical_learning_rate(loss, model, BATCH, optax.sgd)
    expected = sg.critical_learning_rate(own, arrays, BATCH, optax.sgd)
    assert found.critical == pytest.approx(expected.critical, rel=1e-3)
    # The largest eigenvalue of 2 scale^2 X^T X / n.
    x = np.asarray(X, np.float64)
    largest = np.linalg.eigvalsh(2 * 0.01 * x.T @ x / 16)[-1]
    assert sg.sharpness(loss, model, BATCH).largest == pytest.approx(largest, rel=1e-3)


def test_modules_in_a_container_are_an_error_with_a_cure():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    loss = lambda params, batch: jnp.mean(params["net"](batch[0]) ** 2)
    with pytest.raises(TypeError, match="nnx.Dict"):
        sg.critical_learning_rate(loss, {"net": model}, BATCH, optax.sgd)


def test_a_constant_within_the_root_is_counted():
    # With one parameter, P is sqrt(v + eps_root), and v is the squared gradient.
    tx = optax.rmsprop(1.0, decay=1 - 1e-6, initial_scale=1e-10)
    settings = {"b2": 1 - 1e-6, "momentum": 0.0, "eps": 0.0, "eps_root": 1e-8}
    found = sg.sharpness(quadratic, jnp.full(1, 1e-5), jnp.ones(1), tx=tx, **settings)
    expected = 1 / (1e-10 + 1e-8) ** 0.5
    assert found.largest == pytest.approx(expected, rel=1e-3)
    assert found.stable_rate == pytest.approx(2 / expected, rel=1e-3)
    with pytest.raises(ValueError, match="`eps_root`"):
        sg.sharpness(quadratic, jnp.ones(1), jnp.ones(1), tx=tx, eps_root=-1.0)


@pytest.mark.slow
def test_a_loss_near_zero_does_not_blow_up_by_its_noise():
    def loss(params, batch):
        mean, log_scale = params
        squares = 0.5 * ((batch - mean) / jnp.exp(log_scale)) ** 2
        return jnp.mean(squares + log_scale) - 0.5

    rng = np.random.default_rng(15)
    for _ in range(10):
        batches = [jnp.asarray(b, jnp.float32) for b in rng.normal(size=(100, 32))]
        test = sg.learning_rate_range_test(loss, jnp.zeros(2), batches, optax.adam)
        assert test.divergence > 1e-2


@pytest.mark.slow
def test_a_frozen_dict_is_one_batch():
    loss = lambda params, batch: quadratic(params, batch["scales"])
    scales = {"scales": jnp.array([1.0, 10.0])}
    tests = [
        sg.learning_rate_range_test(loss, jnp.ones(2), batch, optax.sgd, low=1e-4)
        for batch in (scales, FrozenDict(scales))
    ]
    assert tests[0].losses == tests[1].losses


@pytest.mark.slow
def test_nan_and_inf_of_a_result_pass_under_debug_flags():
    scales = jnp.array([1.0, 10.0])
    with jax.debug_nans(True), jax.debug_infs(True):
        without = sg.critical_learning_rate(
            quadratic, jnp.ones(2), scales, optax.sgd, steps=0
        )
        falling = sg.critical_learning_rate(
            lambda params, _: -jnp.mean(params), jnp.ones(2), scales, optax.sgd
        )
        test = sg.learning_rate_range_test(
            quadratic, jnp.ones(2), scales, optax.sgd, high=1e30
        )
    assert np.isnan(without.probe) and falling.critical == np.inf
    assert np.isfinite(test.divergence)
