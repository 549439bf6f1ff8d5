"""The published variants against float64 restatements that share no code with them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import oracles
from helpers.clipping import gradients, leaf_norms, packed, run
from helpers.marking import core

import stablegrad as sg

STEPS = 600
RTOL = 2e-4  # float32 against float64, over 600 recurrent steps.
FLAT = gradients(STEPS)
NORMS = np.linalg.norm(np.asarray(FLAT, np.float64), axis=1)
LEAVES = leaf_norms(FLAT)
ZCLIP = {
    "adaptive": {},
    "mean": {"option": "mean"},
    "percentile": {"mode": "percentile"},
    "no fixed limit": {"max_norm": None},
    "mean, no fixed limit": {"option": "mean", "max_norm": None},
    "percentile, no fixed limit": {"mode": "percentile", "max_norm": None},
    "factor": {"clip_factor": 0.7, "max_norm": None},
    "frozen by spikes": {"skip_update_on_spike": True, "max_norm": None},
}


AGC = sg.clip_by_param_norm(published=True)


def per_leaf(factors):
    """One factor a leaf as one an element."""
    return np.repeat(factors, (6, 4, 1), axis=1)


@pytest.mark.parametrize("q", core([10.0, 50.0, 90.0], 10.0))
def test_autoclip(q):
    out, _ = run(sg.clip_by_percentile(q, window=STEPS, published=True), FLAT)
    expected = oracles.autoclip(NORMS, q)[:, None] * FLAT
    np.testing.assert_allclose(out, expected, rtol=RTOL)


@pytest.mark.parametrize("name", core(ZCLIP, "adaptive", "percentile"))
def test_zclip(name):
    out, state = run(sg.clip_by_zscore(2.5, published=True, **ZCLIP[name]), FLAT)
    factors, means, variances = oracles.zclip(NORMS, **ZCLIP[name])
    np.testing.assert_allclose(out, factors[:, None] * FLAT, rtol=RTOL)
    mean, variance = packed(state)[0][-2:]
    np.testing.assert_allclose(mean, means[-1], rtol=RTOL)
    np.testing.assert_allclose(variance, variances[-1], rtol=1e-2)


@pytest.mark.parametrize(
    "mode, clipped, mean, variance",
    [("zscore", 1.500001, 1.01500003, 0.249557), ("percentile", 2.0, 1.03, 0.270727)],
)
def test_zclip_reproduces_the_golden_vectors(mode, clipped, mean, variance):
    tx = sg.clip_by_zscore(
        2.0, published=True, warmup_steps=3, max_norm=None, mode=mode
    )
    state = tx.init(jnp.zeros(1))
    numbers, counts = packed(state)
    numbers, counts = numbers.at[-2:].set([1.0, 0.25]), counts.at[-1].set(3)
    state = state._replace(clip_numbers={"clip_by_zscore": (numbers, counts)})
    out, state = jax.jit(tx.update)(jnp.array([3.0]), state)
    np.testing.assert_allclose(out, clipped, rtol=1e-6)
    now_mean, now_variance = packed(state)[0][-2:]
    np.testing.assert_allclose(now_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(now_variance, variance, rtol=1e-5)


@pytest.mark.parametrize("warmup", core([2, 100], 100))
def test_adagc(warmup):
    out, state = run(sg.clip_by_ema(published=True, warmup_steps=warmup), FLAT)
    factors, gammas = oracles.adagc(LEAVES, warmup=warmup)
    np.testing.assert_allclose(out, per_leaf(factors) * FLAT, rtol=RTOL)
    np.testing.assert_allclose(packed(state)[0][-3:], gammas[-1], rtol=RTOL)


@pytest.mark.parametrize("scale", core([0.0, 1e-4, 1.0], 1.0))
def test_adaptive_gradient_clipping(scale):
    rng = np.random.default_rng(0)
    params = {
        "dense": {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)},
        "conv": {"kernel": rng.normal(size=(3, 3, 4, 2))},
        "gain": rng.normal(size=()),
    }
    params = jax.tree.map(lambda x: jnp.asarray(scale * x, jnp.float32), params)
    grads = jax.tree.map(lambda x: 0.02 * jnp.asarray(rng.normal(size=x.shape)), params)
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    out, _ = jax.jit(AGC.update)(grads, AGC.init(params), params)
    axes = {"dense": {"kernel": 0, "bias": None}, "conv": {"kernel": (0, 1, 2)}}
    axes["gain"] = None
    for found, grad, param, axis in zip(
        jax.tree.leaves(out),
        jax.tree.leaves(grads),
        jax.tree.leaves(params),
        jax.tree.leaves(axes, is_leaf=lambda x: not isinstance(x, dict)),
        strict=True,
    ):
        expected = oracles.agc(np.float64(grad), np.float64(param), axis)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    peer = optax.adaptive_grad_clip(0.01)
    chex.assert_trees_all_close(
        out, peer.update(grads, peer.init(params), params)[0], rtol=1e-5
    )


@pytest.mark.parametrize(
    "param, grad, expected",
    [([3.0, 4.0], [7.0, 24.0], [0.7, 2.4]), ([0.0, 0.0], [1.0, 1.0], [0.0, 0.0])],
)
def test_adaptive_gradient_clipping_reproduces_the_golden_values(param, grad, expected):
    tx = sg.clip_by_param_norm(0.5, eps=0.0, published=True)
    params, grads = {"bias": jnp.array(param)}, {"bias": jnp.array(grad)}
    out, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(out["bias"], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "period, warmup", core([(500, 150), (100, 30), (0, 0)], (100, 30))
)
def test_spam(period, warmup):
    flat = FLAT.copy()
    flat[::97, 3] *= 1e4  # Single elements that the rule is made for.
    inner = optax.adam(1.0, eps=1e-20)
    tx = sg.clip_by_second_moment(
        inner=inner, published=True, reset_every=period, rewarmup_steps=warmup
    )
    out, state = run(tx, flat)
    expected, clipped = oracles.spam(flat, reset_every=period, warmup=warmup, eps=1e-20)
    assert (clipped != flat).sum() >= 4
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=1e-5)
    assert packed(state)[1][-1] == (STEPS // period if period else 0)
    alone, _ = run(sg.clip_by_second_moment(published=True, reset_every=period), flat)
    np.testing.assert_allclose(alone, clipped, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_updates_of_spam_grow_after_a_reset_only_and_with_or_without_an_inner():
    def outputs(**settings):
        tx = sg.clip_by_second_moment(published=True, rewarmup_steps=3, **settings)
        return np.asarray(run(tx, np.ones((12, 11)))[0])[:, 0]

    np.testing.assert_array_equal(outputs(reset_every=0), 1.0)
    never = outputs(reset_every=0, inner=optax.adam(1.0))
    np.testing.assert_allclose(never, -1.0, rtol=1e-4)
    ramp = 1 - 0.99 * (1 + np.cos(np.pi * np.arange(3) / 4)) / 2
    grown = [1, 1, 1, 1, *ramp, 1, 1, *ramp]  # Reset at steps 5 and 10.
    np.testing.assert_allclose(outputs(reset_every=5), grown, rtol=1e-4)


def test_a_published_clip_of_a_large_norm_is_counted_as_a_clip():
    tx = sg.clip_by_zscore(published=True)
    grads = {"w": jnp.full(4, 1e18)}
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    seen = sg.metrics(state)
    assert seen["clip_by_zscore_dropped_steps"] == 0
    assert seen["clip_by_zscore_clipped_steps"] == 1
    np.testing.assert_allclose(jnp.linalg.norm(updates["w"]), 1.0, rtol=1e-5)
    np.testing.assert_allclose(seen["clip_by_zscore_clipped_norm"], 1.0, rtol=1e-5)


def test_a_published_adaclip_has_no_ratio():
    with pytest.raises(ValueError, match="`ratio` must be None as published, got 3.0"):
        sg.clip_by_max(3.0, published=True)


def test_the_published_adagc_has_a_step_to_set_its_mean():
    with pytest.raises(ValueError, match="`warmup_steps` must be an integer >= 2"):
        sg.clip_by_ema(published=True, warmup_steps=1)


@pytest.mark.parametrize("period", core([0, 100, 1000], 100))
def test_adaclip_of_stable_spam(period):
    out, _ = run(sg.clip_by_max(published=True, reset_every=period), FLAT)
    parts = np.split(FLAT, [6, 10], axis=1)
    expected = [oracles.stable_spam_adaclip(x, reset_every=period) for x in parts]
    np.testing.assert_allclose(out, np.concatenate(expected, axis=1), rtol=1e-3)


@pytest.mark.parametrize("d", core([1.0, 0.5], 1.0))
def test_stable_adamw(d):
    inner = optax.adam(1.0, b1=0.9, b2=0.99, eps=1e-6)
    out, _ = run(sg.clip_update_rms(d, inner=inner, published=True), FLAT)
    parts = np.split(FLAT, [6, 10], axis=1)
    expected = [oracles.stable_adamw(x, d=d)[0] for x in parts]
    np.testing.assert_allclose(
        out, np.concatenate(expected, axis=1), rtol=2e-3, atol=1e-5
    )


@pytest.mark.slow
def test_a_nan_poisons_what_it_poisons_as_published():
    flat = FLAT.copy()
    flat[200, 2] = np.nan
    norms = np.linalg.norm(np.asarray(flat, np.float64), axis=1)
    out, _ = run(sg.clip_by_percentile(window=STEPS, published=True), flat)
    np.testing.assert_array_equal(
        np.isnan(out), np.isnan(oracles.autoclip(norms, 10)[:, None] * flat)
    )
    assert np.isnan(out[201:]).all()
    out, _ = run(sg.clip_by_zscore(published=True, max_norm=None), flat)
    expected = oracles.zclip(norms, max_norm=None)[0][:, None] * flat
    np.testing.assert_allclose(out, expected, rtol=RTOL)
    np.testing.assert_array_equal(out[201:], flat[201:])  # Off for ever.


@pytest.mark.slow
def test_an_inf_turns_into_zeros_and_a_nan_as_published():
    flat = FLAT.copy()
    flat[200, 2] = np.inf
    out, state = run(sg.clip_by_zscore(published=True), flat)
    norms = np.linalg.norm(np.asarray(flat, np.float64), axis=1)
    with np.errstate(invalid="ignore"):
        expected = oracles.zclip(norms)[0][:, None] * flat
    np.testing.assert_allclose(out, expected, rtol=RTOL)
    assert np.isnan(out[200, 2]) and (np.delete(out[200], 2) == 0).all()
    chex.assert_tree_all_finite(state)


@pytest.mark.slow
def test_optax_agrees_where_both_are_defined():
    for max_norm in (0.1, 1.0, 30.0):
        out, _ = run(sg.clip_by_norm(max_norm), FLAT)
        np.testing.assert_allclose(
            out, run(optax.clip_by_global_norm(max_norm), FLAT)[0], rtol=1e-5
        )
        expected = oracles.global_norm_clip(NORMS, max_norm)
        np.testing.assert_allclose(out, expected[:, None] * FLAT, rtol=1e-5)


def test_a_fixed_norm_per_leaf_is_optax_block_rms():
    # The root mean square of a leaf is its norm over the root of its size.
    sizes = {"a": 6**0.5, "b": 2.0, "c": 1.0}
    labels = {"a": 0, "b": 1, "c": 2}
    tx = optax.partition(
        {labels[k]: sg.clip_by_norm(0.2 * n) for k, n in sizes.items()}, labels
    )
    np.testing.assert_allclose(
        run(tx, FLAT)[0], run(optax.clip_by_block_rms(0.2), FLAT)[0], rtol=1e-5
    )
