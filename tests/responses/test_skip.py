"""Tests for `stablegrad.skip`."""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training import of_norm, scan

import stablegrad as sg

PARAMS = {"w": jnp.array([1.0, 2.0])}


def skipped(tx, norms, values=None):
    """Which steps were skipped, and everything else that `scan` tells."""
    params, state, history = scan(tx, of_norm(norms), PARAMS, values)
    return np.asarray(history[1]["skipped"]), params, state, history


def test_a_rejected_step_changes_no_bit_of_parameters_and_inner_state():
    norms = [1.0, 1.0, jnp.nan, 1.0, 50.0]
    tx = sg.guard(optax.adamw(0.1), sg.skip(sg.nonfinite(), sg.fixed(10.0)))
    flags, _, _, (params, _, inner) = skipped(tx, norms)
    np.testing.assert_array_equal(flags, [False, False, True, False, True])
    for at in (2, 4):
        chex.assert_trees_all_equal(
            *[jnp.asarray(params["w"][step]) for step in (at - 1, at)]
        )
        before, after = (
            {str(i): leaf[step] for i, leaf in enumerate(_leaves(inner))}
            for step in (at - 1, at)
        )
        chex.assert_trees_all_equal(before, after)


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


@pytest.mark.slow
def test_rejected_steps_leave_no_trace_in_what_follows():
    clean = [1.0, 0.5, 2.0, 1.5]
    faulty = [1.0, jnp.nan, 0.5, jnp.inf, 2.0, 1.5]
    tx = sg.guard(optax.adamw(0.1), sg.skip())
    _, expected, _, _ = skipped(tx, clean)
    _, found, _, _ = skipped(tx, faulty)
    chex.assert_trees_all_equal(found, expected)


def test_nonfinite_steps_are_rejected_however_often_they_come():
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.nonfinite(), max_consecutive=2))
    flags, params, _, _ = skipped(tx, np.full(50, np.nan))
    assert flags.all()
    chex.assert_trees_all_equal(params, PARAMS)


def test_finite_outliers_are_rejected_a_limited_number_of_times_in_a_row():
    norms = [1, 9, 9, 9, 9, 9, 1, 9, 9, 9, 9]
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(2.0), max_consecutive=3))
    flags, *_ = skipped(tx, norms)
    expected = [0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0]
    np.testing.assert_array_equal(flags, np.array(expected, bool))


def test_a_nan_within_a_run_of_outliers_neither_ends_nor_lengthens_it():
    norms = [1, 9, np.nan, 9, np.nan, 9, 9]
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(2.0), max_consecutive=2))
    flags, *_ = skipped(tx, norms)
    np.testing.assert_array_equal(flags, np.array([0, 1, 1, 1, 1, 0, 0], bool))


@pytest.mark.slow
def test_a_bad_loss_does_not_use_up_the_patience_with_outliers():
    norms, values = [1, 9, 9, 9, 9, 1], [1, np.nan, np.nan, 1, 1, 1]
    rules = (sg.fixed(2.0), sg.nonfinite(of="value"))
    tx = sg.guard(optax.sgd(0.1), sg.skip(*rules, max_consecutive=2))
    flags, *_ = skipped(tx, norms, values)
    np.testing.assert_array_equal(flags, np.array([0, 1, 1, 1, 1, 0], bool))


@pytest.mark.slow
def test_two_skips_cannot_reset_each_others_patience():
    norms, values = [1, 9] * 20, [9, 1] * 20
    tx = sg.guard(
        optax.sgd(0.1),
        sg.skip(sg.fixed(2.0), max_consecutive=3),
        sg.skip(sg.fixed(2.0, of="value"), max_consecutive=3),
    )
    flags, *_ = skipped(tx, norms, values)
    assert flags[:6].all()
    assert np.mean(~flags[6:]) > 0.2  # Some are taken: nothing stops the run.


def test_a_bad_loss_with_finite_gradients_is_rejected_with_its_reason():
    tx = sg.guard(
        optax.sgd(0.1), sg.skip(sg.nonfinite(of="value"), sg.fixed(5.0, of="value"))
    )
    flags, _, _, (_, seen, _) = skipped(tx, np.ones(4), [1.0, np.nan, 6.0, np.inf])
    np.testing.assert_array_equal(flags, [False, True, True, True])
    expected = [
        sg.Reason.NONE,
        sg.Reason.NONFINITE_VALUE,
        sg.Reason.VALUE,
        sg.Reason.NONFINITE_VALUE,
    ]
    np.testing.assert_array_equal(seen["skip_reason"], expected)


def test_an_outlying_update_is_rejected_after_the_inner_optimizer_has_run():
    tx = sg.guard(optax.sgd(2.0), sg.skip(sg.fixed(3.0, of="update_norm")))
    flags, _, _, (params, seen, _) = skipped(tx, [1.0, 2.0])
    np.testing.assert_array_equal(flags, [False, True])
    assert seen["skip_reason"][1] == sg.Reason.UPDATE_NORM
    assert seen["update_norm"][1] == 0
    np.testing.assert_allclose(seen["raw_update_norm"][1], 4.0, rtol=1e-6)
    np.testing.assert_array_equal(params["w"][1], params["w"][0])


@pytest.mark.slow
def test_a_function_that_is_not_finite_is_a_reason_of_its_own():
    def of_loss(updates, params, extra):
        del updates, params
        return jnp.log(extra["value"])

    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(1.0, of=of_loss)))
    _, _, _, (_, seen, _) = skipped(tx, np.ones(3), [1.0, 0.0, 10.0])
    expected = [sg.Reason.NONE, sg.Reason.NONFINITE_SIGNAL, sg.Reason.SIGNAL]
    np.testing.assert_array_equal(seen["skip_reason"], expected)


@pytest.mark.slow
def test_one_exploding_leaf_is_enough_per_leaf():
    grads = {"a": jnp.ones((1, 3)), "b": jnp.full((1, 3), 100.0)}
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(10.0, per="leaf")))
    _, state, _ = scan(tx, grads, params)
    assert sg.metrics(state)["skip_reason"] == sg.Reason.GRADIENT_NORM


def test_rejects_arguments_out_of_range():
    with pytest.raises(ValueError, match="`max_consecutive` must be .* got -1"):
        sg.skip(max_consecutive=-1)
    with pytest.raises(TypeError, match="`skip` takes thresholds"):
        sg.skip(sg.skip())


@pytest.mark.slow
def test_an_infinite_loss_does_not_count_as_a_finite_outlier():
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(1.0, of="value"), max_consecutive=2))
    flags, *_ = skipped(tx, np.ones(5), [np.inf, np.inf, 5, 5, 5])
    np.testing.assert_array_equal(flags, [True, True, True, True, False])
