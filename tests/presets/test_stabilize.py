"""Tests for `stablegrad.stabilize`: what the preset does to whole runs."""

import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from helpers.training import of_norm, scan

import stablegrad as sg
from stablegrad.responses.trust_region._response import optional_trust_region

PARAMS = {"w": jnp.array([1.0, 2.0])}
SLOW_ADAM = sg.stabilize(optax.adam(0.01))


def healthy(steps, seed=0):
    """Norms and losses of a run that needs no help."""
    rng = np.random.default_rng(seed)
    return rng.lognormal(0, 0.2, steps), 2.0 + 0.1 * rng.normal(size=steps)


def test_every_default_is_explained():
    text = inspect.getdoc(sg.stabilize)
    for name in inspect.signature(sg.stabilize).parameters:
        assert re.search(rf"^ {{4}}\**{name}: ", text, re.MULTILINE)


def spelled_out(
    *,
    share=0.01,
    window=256,
    refuse_factor=32,
    loss_margin=2,
    factor=0.5,
    regrow_steps=100,
    min_scale=0.01,
    max_consecutive=20,
    halt_after=20,
):
    """The guard of the docstring, with its defaults."""
    usual = {"window": window}
    return sg.guard(
        optax.adam(0.1),
        sg.clip(sg.rarity(share, **usual)),
        sg.skip(
            sg.nonfinite(),
            sg.nonfinite(of="value"),
            sg.rarity(share, margin=refuse_factor, **usual),
            max_consecutive=max_consecutive,
        ),
        sg.back_off(
            sg.rarity(share, margin=loss_margin, of="value", **usual),
            factor=factor,
            confirm_steps=3,
            hold_steps=20,
            regrow_steps=regrow_steps,
            min_scale=min_scale,
        ),
        optional_trust_region(),
        sg.halt(after=halt_after),
    )


SETTINGS = {
    "share": 0.05,
    "window": 30,
    "refuse_factor": 9.0,
    "loss_margin": 1.5,
    "factor": 0.7,
    "regrow_steps": 7,
    "min_scale": 0.6,
    "max_consecutive": 2,
    "halt_after": 3,
}


def eventful():
    """Norms and losses that every setting makes a difference to."""
    norms, values = healthy(180)
    norms[60:64], norms[90:95] = np.nan, 500.0
    norms[70:180:9] *= 6  # Between both refuse factors, and usual or not by the share.
    values[100:103], values[110:112] = [90.0, 91.0, 92.0], [900.0, 9000.0]
    return of_norm(norms), values


@functools.cache
def history(**settings):
    """The run of the preset: parameters and metrics of every step."""
    grads, values = eventful()
    tx = sg.stabilize(optax.adam(0.1), **settings)
    return scan(tx, grads, PARAMS, values)[2][:2]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, SETTINGS])
def test_it_is_the_guard_that_its_docstring_spells_out(settings):
    grads, values = eventful()
    expected = scan(spelled_out(**settings), grads, PARAMS, values)[2][:2]
    chex.assert_trees_all_equal(history(**settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_makes_a_difference_to_that_run(name):
    rest = {key: value for key, value in SETTINGS.items() if key != name}
    differs = jax.tree.map(
        lambda x, y: not np.array_equal(x, y), history(**rest), history(**SETTINGS)
    )
    assert any(jax.tree.leaves(differs))


@pytest.mark.slow
def test_healthy_steps_are_left_alone():
    norms, values = healthy(5000)
    tx = sg.stabilize(optax.sgd(1e-6))
    _, state, (_, seen, _) = scan(tx, of_norm(norms), PARAMS, values)
    assert sg.metrics(state)["skipped_steps"] == 0
    assert sg.metrics(state)["backed_off_steps"] == 0
    assert np.mean(seen["clip_scale"] < 1) < 0.01
    assert np.min(seen["clip_scale"]) > 0.6


@pytest.mark.slow
def test_a_step_without_the_loss_is_warned_of_once():
    tx = sg.stabilize(optax.adam(0.1))
    state, told = tx.init(PARAMS), r"`value=`(.|\n)*optimizer.update(.|\n)*Linen"
    with pytest.warns(UserWarning, match=told) as seen:
        jax.jit(lambda state: tx.update(PARAMS, state, PARAMS, loss=1.0))(state)
        jax.jit(lambda state: tx.update(PARAMS, state, PARAMS))(state)
    (only,) = seen
    assert "By name it got only `loss=`" in str(only.message)
    tx = sg.stabilize(optax.adam(0.1))
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=None)


@pytest.mark.slow
def test_without_a_value_the_loss_thresholds_stay_silent():
    tx = sg.stabilize(optax.adam(0.1))
    params, state = PARAMS, tx.init(PARAMS)
    step = jax.jit(
        lambda grads, state, params: tx.update(grads, state, params, value=None)
    )
    for norm in [*healthy(40)[0], np.nan, 1e8, 1.0]:
        updates, state = step({"w": of_norm([norm])["w"][0]}, state, params)
        params = optax.apply_updates(params, updates)
    seen = sg.metrics(state)
    assert seen["skipped_steps"] == 2
    assert jnp.isinf(seen["back_off_rarity_value_limit"])
    chex.assert_tree_all_finite((params, state))


@pytest.mark.slow
def test_a_learning_rate_that_jumps_is_the_users_own_choice():
    schedule = optax.piecewise_constant_schedule(1e-3, {60: 1000.0})
    norms, values = np.ones(80), healthy(80)[1]
    tx = sg.stabilize(optax.adam(schedule))
    bare = sg.guard(optax.adam(schedule))
    params, state, _ = scan(tx, of_norm(norms), PARAMS, values)
    expected, _, _ = scan(bare, of_norm(norms), PARAMS, values)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)
    assert not any("update_norm" in name for name in sg.metrics(state))


@pytest.mark.slow
def test_leaf_by_leaf_one_that_explodes_costs_the_others_nothing():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    norms, values = healthy(120)
    grads = {"a": of_norm(norms)["w"], "b": of_norm(norms)["w"]}
    grads["b"] = grads["b"].at[60:100].multiply(1e3)
    for per, taken in (("leaf", 40), ("global", 36)):
        tx = sg.stabilize(optax.sgd(1.0), per=per)
        _, _, (trail, seen, _) = scan(tx, grads, params, values)
        assert (~np.asarray(seen["skipped"][60:100])).sum() == taken
        moved = -np.diff(np.asarray(trail["a"]), axis=0)[59:99]
        whole = np.isclose(moved, grads["a"][60:100], rtol=1e-3).all(axis=1)
        assert whole[:4].all() if per == "leaf" else not whole[:4].any()
        # What lasts is usual from then on.
        assert whole[4:].mean() > 0.9


@pytest.mark.slow
def test_settings_may_be_swept_under_vmap():
    norms, values = healthy(300)
    norms[150] = 60.0

    def touched(share, refuse_factor):
        tx = sg.stabilize(optax.sgd(1e-3), share=share, refuse_factor=refuse_factor)
        _, state, _ = scan(tx, of_norm(norms), PARAMS, values)
        seen = sg.metrics(state)
        return seen["clipped_steps"], seen["skipped_steps"]

    clips, skips = jax.vmap(touched)(jnp.array([0.2, 0.01]), jnp.array([1e3, 4.0]))
    assert clips[0] > 20 and clips[1] < 10
    assert skips[0] == 0 and skips[1] == 1


@pytest.mark.parametrize("name, value", [("share", 0.0), ("factor", 2.0)])
def test_rejects_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"must be .*, got {value}"):
        sg.stabilize(optax.sgd(0.1), **{name: value})


@pytest.mark.parametrize("name", ["clip_z", "skip_z", "back_off_z"])
def test_arguments_of_the_z_scores_that_were_are_accepted_with_a_warning(name):
    with pytest.warns(DeprecationWarning, match="judges by `rarity`"):
        sg.stabilize(optax.sgd(0.1), **{name: 3.0})


@pytest.mark.parametrize("factor", core([2.0, 50.0], 50.0))
def test_one_lasting_rise_of_the_loss_costs_one_cut_and_the_rate_comes_back(factor):
    norms, values = healthy(700)
    values[300:] *= factor
    values[300:303] = values[300:303].max() * np.array([1.0, 1.01, 1.02])
    tx = sg.stabilize(optax.sgd(1e-6))
    _, state, (_, seen, _) = scan(tx, of_norm(norms), PARAMS, values)
    assert sg.metrics(state)["backed_off_steps"] == 1
    assert sg.metrics(state)["skipped_steps"] == 0
    scale = np.asarray(seen["lr_scale"])
    assert scale.min() == 0.5 and (scale[300 + 200 :] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("probed", [False, True])
def test_a_term_that_grows_costs_no_cut_where_steps_are_probed(probed):
    truth = jax.random.normal(jax.random.key(1), (8,))
    tx = sg.stabilize(optax.sgd(0.05))

    def step(carry, i):
        params, state = carry
        key = jax.random.key(i)

        def loss_fn(params):
            x = jax.random.normal(key, (32, 8))
            noise = 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (32,))
            term = jnp.clip((i - 1000) / 5, 0.0, 3.0)
            return jnp.mean((x @ (params - truth) + noise) ** 2) + term

        loss, grads = jax.value_and_grad(loss_fn)(params)
        extra = {"value_fn": loss_fn} if probed else {}
        carry = sg.apply(tx, grads, state, params, value=loss, **extra)
        return carry, (loss, sg.metrics(carry[1])["lr_scale"])

    start = jnp.zeros(8), tx.init(jnp.zeros(8))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(1500)))
    (_, state), (losses, scale) = run(start)
    assert losses[990:1000].mean() < 0.02 and losses[-10:].mean() < 3.02
    assert sg.metrics(state)["backed_off_steps"] == (0 if probed else 1)
    assert scale[1000:].min() == (1.0 if probed else 0.5) and scale[-1] == 1


@pytest.mark.slow
def test_a_loss_that_has_risen_and_falls_costs_no_cut():
    norms, values = healthy(700)
    values[300:] += 50 * np.exp(-np.arange(400) / 30)
    tx = sg.stabilize(optax.sgd(1e-6))
    _, state, _ = scan(tx, of_norm(norms), PARAMS, values)
    assert sg.metrics(state)["backed_off_steps"] == 0


@pytest.mark.slow
def test_a_loss_that_keeps_rising_lowers_the_rate_to_the_floor():
    norms, values = healthy(360)
    values[300:] += 2.0 ** np.arange(60)
    tx = sg.stabilize(optax.sgd(1e-6))
    _, _, (_, seen, _) = scan(tx, of_norm(norms), PARAMS, values)
    assert np.min(seen["lr_scale"]) == np.float32(0.01)


@pytest.mark.slow
def test_a_kind_of_batch_that_comes_every_sixteenth_step_is_data():
    norms, values = healthy(3000)
    norms[::16] *= 50
    tx = sg.stabilize(optax.sgd(1e-6))
    _, state, (_, seen, _) = scan(tx, of_norm(norms), PARAMS, values)
    assert sg.metrics(state)["skipped_steps"] <= 4
    shrunk = np.asarray(seen["clip_scale"] < 1)[::16]
    assert shrunk[:60].sum() <= 25
    assert np.asarray(seen["clip_scale"])[1000:].min() >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("size, at", [(1e17, 1), (1e4, 2), (1e17, 10)])
def test_a_finite_spike_during_warm_up_does_not_freeze_adam(size, at):
    # Adam's second moment would remember 1e17 for 80,000 steps.
    norms, values = healthy(120)
    norms[at] = size
    _, state, (trail, seen, _) = scan(SLOW_ADAM, of_norm(norms), PARAMS, values)
    assert seen["skipped"][at] and sg.metrics(state)["skipped_steps"] == 1
    moved = np.linalg.norm(np.diff(trail["w"], axis=0), axis=1)
    assert (moved[-40:] > 0.005).all()
