"""Derivatives through a guarded step, as in meta-learning and hypergradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core

import stablegrad as sg

X = jax.random.normal(jax.random.key(0), (8, 3))
PARAMS = {"w": jnp.array([0.5, -1.0, 2.0])}
SOLVED = X @ PARAMS["w"]  # Targets at which the inner gradient is exactly zero.
INNER = optax.sgd(0.1)

WIDE = sg.fixed(100.0)  # Shrinks nothing here.
GUARDED = {
    "stabilize": sg.stabilize(INNER),
    "per leaf": sg.stabilize(INNER, per="leaf"),
    "skip": sg.guard(INNER, sg.skip(sg.rarity())),
    "clip": sg.guard(INNER, sg.clip(WIDE)),
    "clip by unit": sg.guard(INNER, sg.clip(sg.param_ratio(100.0))),
    "clip_by_norm": optax.chain(sg.clip_by_norm(100.0), INNER),
    "clip_by_zscore": optax.chain(sg.clip_by_zscore(), INNER),
    "clip_by_ema": optax.chain(sg.clip_by_ema(), INNER),
    "clip_by_percentile": optax.chain(sg.clip_by_percentile(), INNER),
    "clip_by_param_norm": optax.chain(sg.clip_by_param_norm(100.0), INNER),
    "clip_update_rms": optax.chain(sg.clip_update_rms(), INNER),
    "clip_by_max": optax.chain(sg.clip_by_max(), INNER),
    "clip_by_second_moment": optax.chain(sg.clip_by_second_moment(), INNER),
    "limit_direction": optax.chain(sg.limit_direction(), INNER),
}


def loss_fn(params, y):
    return jnp.mean((X @ params["w"] - y) ** 2)


def outer_loss(tx, params, y):
    """The loss after two inner steps, with a penalty on the parameters."""
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    for _ in range(2):
        loss, grads = jax.value_and_grad(loss_fn)(params, y)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    return loss_fn(params, y) + 0.1 * jnp.sum(params["w"] ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", core(GUARDED, "stabilize"))
def test_the_derivative_through_healthy_steps_is_that_of_the_optimizer(name):
    # One task of the batch is solved: the norm of its gradient has no slope.
    tasks = jnp.stack([SOLVED, SOLVED + 1.0])

    def meta_gradient(tx):
        outer = lambda params: jax.vmap(lambda y: outer_loss(tx, params, y))(tasks)
        return jax.jit(jax.jacrev(outer))(PARAMS)["w"]

    bare, found = meta_gradient(INNER), meta_gradient(GUARDED[name])
    assert np.isfinite(bare).all()
    np.testing.assert_allclose(found, bare, rtol=1e-5)


@pytest.mark.slow
def test_the_derivative_through_a_clip_is_that_of_the_clipped_direction():
    tx = sg.guard(INNER, sg.clip(sg.fixed(0.5)))
    outer = lambda w: outer_loss(tx, {"w": w}, SOLVED + 1.0)
    found, w, h = jax.grad(outer)(PARAMS["w"]), PARAMS["w"], 1e-2
    steps = h * jnp.eye(3)
    wanted = [(outer(w + step) - outer(w - step)) / (2 * h) for step in steps]
    np.testing.assert_allclose(found, wanted, rtol=2e-3)
