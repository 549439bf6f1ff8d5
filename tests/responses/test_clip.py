"""Tests for `stablegrad.clip`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training import of_norm, scan

import stablegrad as sg

RTOL = 1e-6  # One float32 product and one square root.


def one_step(tx, grads, params=None, **extra):
    """The updates of a first step."""
    params = jax.tree.map(jnp.zeros_like, grads) if params is None else params
    return jax.jit(tx.update)(grads, tx.init(params), params, **extra)


@functools.cache
def to_one():
    return sg.guard(optax.identity(), sg.clip(sg.fixed(1.0)))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 7.0, 1e10, 0.9e18])
def test_shrinks_to_the_limit_and_never_grows(norm, strict):
    updates, state = one_step(to_one(), of_norm([norm])["w"][0])
    np.testing.assert_allclose(jnp.linalg.norm(updates), min(norm, 1.0), rtol=RTOL)
    assert sg.metrics(state)["clipped_steps"] == int(norm > 1)


@pytest.mark.slow
def test_agrees_with_optax_where_both_are_defined():
    grads = {"a": jnp.array([[3.0, -4.0], [0.5, 2.0]]), "b": jnp.array([12.0])}
    ours, _ = one_step(sg.guard(optax.identity(), sg.clip(sg.fixed(1.5))), grads)
    theirs, _ = optax.clip_by_global_norm(1.5).update(grads, optax.EmptyState())
    chex.assert_trees_all_close(ours, theirs, rtol=RTOL)


@pytest.mark.slow
def test_float16_gradients_of_300_are_clipped_to_the_right_size():
    grads = {"w": jnp.full((16,), 300, jnp.float16)}
    updates, _ = one_step(sg.guard(optax.identity(), sg.clip(sg.fixed(4.0))), grads)
    assert updates["w"].dtype == jnp.float16
    np.testing.assert_array_equal(updates["w"], np.ones(16))


@pytest.mark.slow
def test_per_leaf_shrinks_only_the_leaf_that_explodes():
    grads = {"calm": jnp.array([0.6, 0.8]), "wild": jnp.array([3e5, 4e5])}
    tx = sg.guard(optax.identity(), sg.clip(sg.fixed(1.0, per="leaf")))
    updates, state = one_step(tx, grads)
    np.testing.assert_array_equal(updates["calm"], grads["calm"])
    np.testing.assert_allclose(updates["wild"], [0.6, 0.8], rtol=RTOL)
    np.testing.assert_allclose(
        sg.metrics(state)["clipped_grad_norm"], np.sqrt(2), rtol=RTOL
    )


@pytest.mark.slow
def test_several_clips_apply_the_smallest_factor_not_the_product():
    tx = sg.guard(
        optax.identity(), sg.clip(sg.fixed(2.0)), sg.clip(sg.fixed(1.0, per="leaf"))
    )
    grads = {"a": jnp.array([8.0]), "b": jnp.array([0.5])}
    updates, _ = one_step(tx, grads)
    np.testing.assert_allclose(updates["a"], [1.0], rtol=RTOL)
    np.testing.assert_allclose(updates["b"], [1.0 / np.sqrt(64.25)], rtol=1e-5)


@pytest.mark.slow
def test_update_norm_limits_what_is_applied_whatever_the_learning_rate():
    # Adam undoes any clipping of the gradient, so only this limits its step.
    tx = sg.guard(optax.adam(10.0), sg.clip(sg.fixed(0.1, of="update_norm")))
    updates, state = one_step(tx, {"w": jnp.array([3.0, 4.0])})
    np.testing.assert_allclose(jnp.linalg.norm(updates["w"]), 0.1, rtol=1e-5)
    seen = sg.metrics(state)
    np.testing.assert_allclose(seen["raw_update_norm"], 10 * np.sqrt(2), rtol=1e-4)
    np.testing.assert_allclose(seen["update_norm"], 0.1, rtol=1e-5)


@pytest.mark.slow
def test_a_function_of_the_gradient_can_be_the_signal():
    def largest(updates, params, extra):
        del params, extra
        return jnp.max(jnp.abs(updates["w"]))

    tx = sg.guard(optax.identity(), sg.clip(sg.fixed(1.0, of=largest)))
    updates, state = one_step(tx, {"w": jnp.array([1.0, -4.0])})
    np.testing.assert_allclose(updates["w"], [0.25, -1.0], rtol=RTOL)
    assert "clip_fixed_largest_limit" in sg.metrics(state)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_is_rejected_and_not_clipped(bad):
    grads = {"a": jnp.array([5.0, bad]), "b": jnp.array([7.0])}
    updates, state = one_step(to_one(), grads)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, grads))
    assert sg.metrics(state)["skipped_steps"] == 1
    assert sg.metrics(state)["clipped_steps"] == 0


@pytest.mark.slow
def test_an_update_norm_that_jumps_is_followed_by_degrees():
    schedule = optax.piecewise_constant_schedule(1e-3, {60: 1000.0})
    tx = sg.guard(optax.adam(schedule), sg.clip(sg.zscore(2.5, of="update_norm")))
    norms = np.random.default_rng(0).lognormal(0, 0.2, 200)
    _, _, (_, seen, _) = scan(tx, of_norm(norms), {"w": jnp.ones(2)})
    moved = np.asarray(seen["update_norm"])
    assert seen["raw_update_norm"][60] > 300 * moved[59]
    assert moved[60] < 3 * moved[59]
    np.testing.assert_allclose(moved[-1], seen["raw_update_norm"][-1], rtol=1e-5)


@pytest.mark.slow
def test_the_detector_sees_the_raw_norm_not_the_clipped_one():
    # Rule 10. Fed with clipped norms, the level would stay at 1 for ever.
    norms = np.concatenate([np.ones(30), np.full(200, 50.0)])
    tx = sg.guard(optax.identity(), sg.clip(sg.zscore(2.5)))
    grads = of_norm(norms)
    _, _, (_, seen, _) = scan(tx, grads, {"w": jnp.zeros(2)})
    np.testing.assert_allclose(seen["grad_norm"], norms, rtol=1e-5)
    assert seen["clip_scale"][30] < 0.05
    np.testing.assert_array_equal(seen["clip_scale"][-100:], 1.0)


def test_rejects_what_it_cannot_clip_by():
    with pytest.raises(ValueError, match="`clip` must watch a norm"):
        sg.clip(sg.zscore(2.5, of="value"))
    with pytest.raises(TypeError, match="`clip` takes thresholds.*got 2.5"):
        sg.clip(2.5)


@pytest.mark.slow
def test_several_clips_of_the_update_apply_the_smallest_factor_too():
    rules = [sg.clip(sg.fixed(limit, of="update_norm")) for limit in (2.0, 1.0)]
    updates, _ = one_step(
        sg.guard(optax.identity(), *rules), {"w": jnp.array([3.0, 4])}
    )
    np.testing.assert_allclose(jnp.linalg.norm(updates["w"]), 1.0, rtol=RTOL)


def first_element(updates, params, extra):
    del params, extra
    return updates["w"][0]


BELOW_ZERO = sg.guard(optax.identity(), sg.clip(sg.fixed(-1.0, of=first_element)))


@pytest.mark.slow
@pytest.mark.parametrize("signal, factor", [(0.0, 1), (-0.5, 1), (2.0, 0)])
def test_a_negative_limit_never_turns_a_gradient_around(signal, factor):
    updates, _ = one_step(BELOW_ZERO, {"w": jnp.array([signal, 4.0])})
    np.testing.assert_array_equal(updates["w"], factor * np.array([signal, 4.0]))
