"""Tests for `stablegrad.skip_bad_steps`: decisions as published, and repaired."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import oracles
from helpers.marking import core
from helpers.training import of_norm, scan

import stablegrad as sg

PARAMS = {"w": jnp.array([1.0, 2.0])}
STEPS = 900
RULES = ["olmo", "levanter", "maxtext", "axlearn_mean", "axlearn_deviation"]


def history(seed=0):
    """Norms and losses with outliers, a burst, and a lasting rise of both."""
    rng = np.random.default_rng(seed)
    norms, values = rng.lognormal(0, 0.2, STEPS), 3 + 0.1 * rng.normal(size=STEPS)
    norms[[80, 200, 230, 560, 620]] = [9.0, 40.0, 3.1, 60.0, 500.0]
    values[[90, 300, 320]] = [9.0, 30.0, 6.0]
    norms[400:410] *= 8.0
    norms[600:] *= 8.0
    return norms.astype(np.float32), values.astype(np.float32)


@functools.cache
def guard(rule, published=False):
    """One of each, so that its run is compiled once."""
    return sg.skip_bad_steps(optax.sgd(1e-9), rule, published=published)


def decisions(tx, norms, values):
    """Which steps are skipped."""
    _, state, (_, seen, _) = scan(tx, of_norm(norms), PARAMS, values)
    return np.asarray(seen["skipped"]), state


def as_published(rule, norms, values):
    if rule == "axlearn_mean":
        return oracles.axlearn_drop(norms, kind="ema")[0]
    if rule == "axlearn_deviation":
        return oracles.axlearn_drop(norms, kind="stddev")[0]
    return getattr(oracles, f"{rule}_skip")(values, norms)


@pytest.mark.parametrize("rule", core(RULES, "olmo"))
def test_published_decisions_match_the_float64_oracle(rule):
    norms, values = history()
    skipped, _ = decisions(guard(rule, published=True), norms, values)
    expected = as_published(rule, norms, values)
    assert expected.sum() >= 2
    np.testing.assert_array_equal(skipped, expected)


@pytest.mark.slow
def test_without_a_loss_the_published_rule_judges_norms_alone():
    norms, _ = history()
    tx = sg.skip_bad_steps(optax.sgd(1e-9), published=True)

    def step(state, norm):
        grads = {"w": norm * jnp.ones(2) / 2**0.5}
        _, state = tx.update(grads, state, PARAMS, value=None)
        return state, sg.metrics(state)["skipped"]

    _, skipped = jax.jit(lambda s, xs: jax.lax.scan(step, s, xs))(
        tx.init(PARAMS), jnp.asarray(norms)
    )
    np.testing.assert_array_equal(skipped, oracles.olmo_skip(None, norms))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, streak", core([("olmo", 129), ("levanter", 129)], ("olmo", 129))
)
def test_one_nan_loss_skips_129_steps_as_published_and_one_by_default(rule, streak):
    norms, values = (
        np.ones(STEPS),
        3 + 0.1 * np.random.default_rng(0).normal(size=STEPS),
    )
    values[300] = np.nan
    published = guard(rule, published=True)
    assert decisions(published, norms, values)[0].sum() == streak
    skipped, state = decisions(guard(rule), norms, values)
    np.testing.assert_array_equal(np.flatnonzero(skipped), [300])
    chex.assert_tree_all_finite(state)


@pytest.mark.slow
def test_an_outlier_hides_the_next_as_published_and_not_by_default():
    norms, values = history()
    values = np.full(STEPS, 3.0)
    norms = np.random.default_rng(0).lognormal(0, 0.2, STEPS)
    norms[200], norms[230] = 40.0, 6.0
    published, repaired = guard("olmo", published=True), guard("olmo")
    assert decisions(published, norms, values)[0][[200, 230]].tolist() == [True, False]
    assert decisions(repaired, norms, values)[0][[200, 230]].tolist() == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("rule", core(RULES, "olmo"))
def test_a_lasting_shift_is_taken_within_100_steps_by_default(rule):
    norms = np.random.default_rng(0).lognormal(0, 0.1, STEPS)
    norms[600:] *= 50.0
    skipped, _ = decisions(guard(rule), norms, np.full(STEPS, 3.0))
    assert skipped[600] and not skipped[700:].any()


@pytest.mark.slow
def test_a_lasting_shift_is_refused_for_ever_by_axlearn_as_published():
    norms = np.random.default_rng(0).lognormal(0, 0.1, STEPS)
    norms[600:] *= 50.0
    tx = guard("axlearn_deviation", published=True)
    assert decisions(tx, norms, np.full(STEPS, 3.0))[0][600:].all()


@pytest.mark.slow
@pytest.mark.parametrize("published", core([True, False], False))
def test_a_nan_gradient_never_reaches_the_parameters(published):
    norms = np.ones(40)
    norms[20:30] = np.nan
    tx = sg.skip_bad_steps(optax.adam(0.1), published=published)
    _, _, (params, seen, _) = scan(tx, of_norm(norms), PARAMS, np.full(40, 3.0))
    assert seen["skipped"][20:30].all()
    chex.assert_tree_all_finite(params)
    chex.assert_trees_all_equal(params["w"][19], params["w"][29])


@pytest.mark.parametrize(
    "settings, message",
    [({"rule": "mean"}, "`rule` must be one of"), ({"multiplier": 1.0}, "must be > 1")],
)
def test_rejects_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        sg.skip_bad_steps(optax.sgd(0.1), **settings)
