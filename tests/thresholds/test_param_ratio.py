"""Tests for `stablegrad.param_ratio`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg

RNG = np.random.default_rng(0)
PARAMS = {
    "kernel": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32),
    "bias": jnp.zeros(3),
}


def clipped(tx, grads, params=PARAMS):
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


@pytest.mark.slow
@pytest.mark.parametrize("per, axis", [("unit", 0), ("leaf", None)])
def test_each_group_is_held_to_a_share_of_its_own_parameters(per, axis):
    tx = sg.guard(optax.sgd(1.0), sg.clip(sg.param_ratio(0.1, per=per)))
    out = clipped(tx, PARAMS | {"bias": jnp.ones(3)})
    kernel = np.asarray(PARAMS["kernel"], np.float64)
    np.testing.assert_allclose(out["kernel"], -0.1 * kernel, rtol=1e-5)
    # A bias of zeros counts as one of norm 1.
    np.testing.assert_allclose(np.linalg.norm(out["bias"]), 0.1, rtol=1e-5)
    small = jax.tree.map(lambda x: 0.05 * x, PARAMS)
    np.testing.assert_allclose(clipped(tx, small)["kernel"], -0.05 * kernel, rtol=1e-5)


@pytest.mark.slow
def test_it_holds_updates_too():
    rule = sg.clip(sg.param_ratio(0.5, of="update_norm", per="leaf"))
    out = clipped(sg.guard(optax.sgd(10.0), rule), PARAMS)
    np.testing.assert_allclose(out["kernel"], -0.5 * PARAMS["kernel"], rtol=1e-5)


@pytest.mark.slow
def test_weights_of_zero_move_as_if_their_units_had_norm_eps():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = sg.guard(optax.sgd(1.0), sg.clip(sg.param_ratio(0.1, eps=0.5)))
    out = clipped(tx, PARAMS, zeros)
    norms = np.linalg.norm(out["kernel"], axis=0)
    np.testing.assert_allclose(norms, 0.05, rtol=1e-5)


@pytest.mark.slow
def test_the_ratio_may_be_traced():
    def size(ratio):
        tx = sg.guard(optax.sgd(1.0), sg.clip(sg.param_ratio(ratio, per="global")))
        return jnp.linalg.norm(clipped(tx, PARAMS)["kernel"])

    found = jax.vmap(size)(jnp.array([0.1, 0.2]))
    whole = np.linalg.norm(PARAMS["kernel"])
    np.testing.assert_allclose(found / whole, [0.1, 0.2], rtol=1e-5)


def test_a_step_without_parameters_says_how_to_pass_them():
    tx = sg.guard(optax.sgd(1.0), sg.clip(sg.param_ratio(0.1)))
    with pytest.raises(ValueError, match=r"`param_ratio` needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_it_watches_norms_only():
    with pytest.raises(ValueError, match="must be 'grad_norm' or 'update_norm'"):
        sg.param_ratio(0.1, of="value", per="global")
