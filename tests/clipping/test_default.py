"""The default variants: what every clip of a chain promises, and what each repairs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clipping import PARAMS, flatten, gradients, leaf_norms, packed, run, tree
from helpers.marking import core

import stablegrad as sg

CLIPS = {
    "clip_by_norm": sg.clip_by_norm(5.0),
    "clip_by_percentile": sg.clip_by_percentile(),
    "clip_by_zscore": sg.clip_by_zscore(),
    "clip_by_ema": sg.clip_by_ema(),
    "clip_by_param_norm": sg.clip_by_param_norm(2.0),
    "clip_by_second_moment": sg.clip_by_second_moment(25.0),
    "clip_update_rms": sg.clip_update_rms(),
    "clip_by_max": sg.clip_by_max(),
}
ADAPTIVE = ["clip_by_percentile", "clip_by_zscore", "clip_by_ema"]
ADAPTIVE += ["clip_update_rms", "clip_by_max"]
STEPS = 400


def healthy(steps=STEPS, sigma=0.2, seed=0):
    """Gradients of one direction and lognormal norms around 1."""
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(0.0, sigma, size=(steps, 1))
    return (norms * np.full((1, 11), 11**-0.5)).astype(np.float32)


def kept(out, flat):
    """The share of each row's norm that is left."""
    return np.linalg.norm(out, axis=1) / np.linalg.norm(np.float64(flat), axis=1)


every = pytest.mark.parametrize(
    "name", core(CLIPS, "clip_by_norm", "clip_by_zscore", "clip_by_max")
)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@every  # Slowest to change: one program for both.
def test_a_nonfinite_step_becomes_zeros_and_teaches_nothing(name, bad):
    flat = healthy(120)
    clean, before = run(CLIPS[name], flat)
    faulty = np.insert(flat, 60, flat[60], axis=0)[:120]  # One program for both.
    faulty[60, 7] = bad
    out, state = run(CLIPS[name], faulty)
    assert (out[60] == 0).all()
    np.testing.assert_allclose(np.delete(out, 60, axis=0), clean[:-1], rtol=1e-6)
    chex.assert_tree_all_finite(state)
    seen = sg.metrics(state)
    assert seen[f"{name}_dropped_steps"] == 1
    assert sg.metrics(before)[f"{name}_dropped_steps"] == 0


@every
def test_a_gradient_of_1e17_is_clipped_to_size_and_does_not_hide_the_next(name):
    flat = healthy(120)
    flat[80] *= 1e17
    flat[100] *= 50.0
    out, state = run(CLIPS[name], flat)
    sizes = np.linalg.norm(out, axis=1)
    assert 0.5 < sizes[80] < 20.0
    assert sizes[100] < 20.0
    seen = sg.metrics(state)
    assert seen[f"{name}_clipped_steps"] >= 2 and seen[f"{name}_dropped_steps"] == 0
    chex.assert_tree_all_finite(state)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e10, 1e17, 1e23])
def test_the_update_rms_has_no_largest_ratio(size):
    flat = 1e-6 * healthy(120)
    flat[80] *= size
    out, state = run(sg.clip_update_rms(), flat)
    assert 0.5e-6 < np.linalg.norm(out[80]) < 20e-6
    clipped = sg.metrics(state)["clip_update_rms_clipped_steps"]
    assert clipped >= 1
    chex.assert_tree_all_finite(state)


@every
def test_a_gradient_of_1e20_is_dropped_and_does_not_hide_the_next(name):
    flat = healthy(120)
    flat[80] *= 1e20
    flat[100] *= 50.0
    out, state = run(CLIPS[name], flat)
    assert (out[80] == 0).all()
    assert 0 < np.linalg.norm(out[100]) < 20.0
    seen = sg.metrics(state)
    assert seen[f"{name}_dropped_steps"] == 1 and seen[f"{name}_clipped_steps"] >= 1
    chex.assert_tree_all_finite(state)


@every
def test_under_one_per_cent_of_healthy_steps_is_clipped(name):
    flat = healthy(3000)
    out, state = run(CLIPS[name], flat)
    share = np.mean(kept(out, flat) < 1 - 1e-5)
    assert share <= 0.011
    counted = sg.metrics(state)[f"{name}_clipped_steps"]
    assert abs(counted / 3000 - share) < 2e-3


@pytest.mark.parametrize("factor", [5.0, 1e3, 1e-3])
@pytest.mark.parametrize("name", core(ADAPTIVE, "clip_by_zscore", "clip_by_max"))
def test_a_lasting_shift_is_followed_within_100_steps(name, factor):
    flat = healthy()
    flat[200:] *= factor
    flat[390] *= 100.0
    out, _ = run(CLIPS[name], flat)
    share = kept(out, flat)
    assert np.median(share[300:]) > 0.99 and np.mean(share[300:390] < 0.9) < 0.1
    if name != "clip_update_rms" or factor > 1:  # The moment remembers the old level.
        assert share[390] < 0.2  # It is again held against the new level.
    if factor > 1:
        assert share[200] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_by_ema", "clip_update_rms", "clip_by_max"])
def test_a_leaf_that_explodes_leaves_the_others_alone(name):
    flat = healthy()
    flat[200:230, 6:10] *= 1e3
    out, _ = run(CLIPS[name], flat)
    others = [*range(6), 10]
    np.testing.assert_allclose(out[200:230, others], flat[200:230, others], rtol=1e-5)
    assert leaf_norms(out)[200:210, 1].max() < 20  # Of 600.


def test_float16_gradients_of_300_are_clipped_to_size():
    params = {"w": jnp.zeros(100, jnp.float16)}
    grads = {"w": jnp.full(100, 300.0, jnp.float16)}  # Norm 3000, squares overflow.
    tx = sg.clip_by_norm(1.0)
    out, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert out["w"].dtype == jnp.float16
    np.testing.assert_allclose(np.linalg.norm(np.float64(out["w"])), 1.0, rtol=1e-3)


@pytest.mark.slow
def test_a_clip_works_inside_a_guard_and_both_are_read_at_once():
    clips = optax.chain(sg.clip_by_zscore(), sg.clip_by_norm(1.0), sg.clip_by_norm(0.5))
    tx = sg.guard(optax.chain(clips, optax.sgd(1.0)), sg.skip())
    updates, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    seen = sg.metrics(state)
    np.testing.assert_allclose(seen["clip_by_norm_raw_norm"], 11**0.5, rtol=1e-5)
    np.testing.assert_allclose(seen["clip_by_norm_2_raw_norm"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(seen["clip_by_norm_2_clipped_norm"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(seen["clip_by_norm_2_scale"], 0.5, rtol=1e-5)
    assert seen["clip_by_zscore_limit"] == jnp.inf and seen["guarded_steps"] == 1
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


@pytest.mark.slow
def test_clip_by_percentile_shrinks_one_step_in_two_hundred():
    flat = healthy(5000, sigma=0.5)
    out, _ = run(sg.clip_by_percentile(), flat)
    assert 0.002 < np.mean(kept(out, flat) < 1 - 1e-5) < 0.01


@pytest.mark.parametrize("settings", [{"mode": "percentile"}, {"max_norm": 2.0}])
def test_settings_of_the_published_zclip_need_published(settings):
    with pytest.raises(ValueError, match="belongs to the published rule: pass"):
        sg.clip_by_zscore(**settings)


def test_the_head_is_left_out_by_name():
    params = {
        "body": {"kernel": jnp.ones((2, 2))},
        "head": {"kernel": jnp.ones((2, 2))},
    }
    grads = jax.tree.map(lambda x: 100 * x, params)
    tx = sg.clip_by_param_norm(0.1, exclude="head")
    out, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(out["body"]["kernel"], 0.1, rtol=1e-5)
    chex.assert_trees_all_equal(out["head"], grads["head"])


def test_zero_weights_leave_zero_by_default_and_hardly_as_published():
    params, grads = {"kernel": jnp.zeros((64, 8))}, {"kernel": jnp.ones((64, 8))}
    sizes = []
    for published in (False, True):
        clip = sg.clip_by_param_norm(published=published)
        tx = optax.chain(clip, optax.sgd(1.0))
        step = jax.jit(lambda p, s, tx=tx: tx.update(grads, s, p))
        now, state = params, tx.init(params)
        for _ in range(50):
            updates, state = step(now, state)
            now = optax.apply_updates(now, updates)
        sizes.append(np.abs(now["kernel"]).mean())
    assert sizes[0] > 0.04 and sizes[0] > 500 * sizes[1]


@pytest.mark.slow
def test_elements_are_clamped_in_order_by_default():
    # As published 1.01 becomes 0.1 beside an element of 10, and 0.99 stays.
    flat = healthy(60)
    flat[:, :6] = 1.0
    flat[50, :6] = [10.0, 2.02, 1.99, 1.0, -10.0, 0.0]
    out, _ = run(sg.clip_by_max(2.0), flat)
    np.testing.assert_allclose(out[50, :6], [2, 2, 1.99, 1, -2, 0], rtol=1e-4)
    out, _ = run(sg.clip_by_max(published=True), flat)
    assert out[50, 1] < 0.3 < 1 == out[50, 3]  # What was larger ends smaller.


@pytest.mark.slow
def test_an_element_never_seen_before_is_not_clamped_to_zero():
    flat = healthy(60)
    flat[:40, 3] = 0.0
    out, _ = run(sg.clip_by_second_moment(), flat)
    np.testing.assert_allclose(out, flat, rtol=1e-6)
    out, _ = run(sg.clip_by_second_moment(published=True), flat)
    assert (out[20:, 3] == 0).all()  # For ever, until the next reset.


def adam_run(tx, flat):
    """Updates, and the number of resets after every step."""

    def step(state, grads):
        updates, state = tx.update(grads, state, PARAMS)
        inner = optax.tree.get(state, "count")
        return state, (updates, packed(state)[1][-1], inner)

    scan = jax.jit(lambda s, xs: jax.lax.scan(step, s, xs))
    _, (updates, resets, counts) = scan(tx.init(PARAMS), tree(flat))
    return flatten(updates), np.asarray(resets), np.asarray(counts)


@pytest.mark.slow
def test_moments_are_reset_on_a_spike_with_their_correction():
    flat = gradients(120, sigma=0.1)
    flat[40] /= 50.0
    flat[80], flat[90:] = flat[80] / 6.0, flat[90:] / 4.0
    flat[100] *= 1e4
    inner = optax.adam(1.0)
    tx = sg.clip_by_second_moment(inner=inner, reset_on_spike=True, rewarmup_steps=4)
    updates, resets, counts = adam_run(tx, flat)
    assert np.flatnonzero(np.diff(resets)).tolist() == [99]
    assert counts[99] == 100 and counts[100] == 0 and counts[101] == 1
    # The first step of a new Adam has size 1 an element; it is warmed up from 0.01.
    np.testing.assert_allclose(np.abs(updates[101]), 0.01, rtol=1e-3)
    assert np.abs(updates[106]).max() > 0.3


@pytest.mark.slow
def test_moments_are_reset_on_a_clock_if_asked_to():
    tx = sg.clip_by_second_moment(inner=optax.adam(1.0), reset_every=30)
    _, resets, counts = adam_run(tx, gradients(100))
    assert resets[-1] == 3 and counts[-1] == 10


def test_an_inner_optimizer_without_moments_is_an_error():
    tx = sg.clip_by_second_moment(inner=optax.sgd(0.1))
    with pytest.raises(ValueError, match="one first moment `mu`.*this one has 0"):
        tx.init(PARAMS)


def test_the_published_update_rms_needs_the_optimizer():
    with pytest.raises(ValueError, match="inner=optax.adamw"):
        sg.clip_update_rms(published=True)


@pytest.mark.slow
def test_a_spike_does_not_enter_the_moments_by_default():
    flat = healthy(60)
    flat[40] *= 1e3
    inner = optax.adam(1.0)
    states = [
        run(tx, flat)[1]
        for tx in (
            sg.clip_update_rms(inner=inner),
            sg.clip_update_rms(inner=inner, published=True),
        )
    ]
    repaired, published = [optax.tree.get(s, "nu")["b"].max() for s in states]
    assert published > 1e3 * repaired


def test_integer_gradients_of_floating_point_parameters_are_clipped():
    tx, params = sg.clip_by_norm(1.0), jnp.zeros(3)
    updates, state = tx.update(jnp.array([3, -4, 12]), tx.init(params), params)
    np.testing.assert_allclose(updates, np.array([3, -4, 12]) / 13, rtol=1e-6)
    assert sg.metrics(state)["clip_by_norm_raw_norm"] == 13


@pytest.mark.parametrize("name", ["clip_by_ema", "clip_by_max", "clip_update_rms"])
def test_a_step_with_other_leaves_than_at_init_is_an_error(name):
    tx = getattr(sg, name)()
    with pytest.raises(ValueError, match="another pytree"):
        tx.update({"b": PARAMS["b"]}, tx.init(PARAMS))
