"""Tests for `stablegrad.halt` and `stablegrad.raise_if_halted`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training import of_norm, scan

import stablegrad as sg

PARAMS = {"w": jnp.array([1.0, 2.0])}


def test_a_stuck_stream_halts_and_leaves_the_parameters_as_they_were():
    # Rule 9. `optax.apply_if_finite` applies the nan after some steps.
    tx = sg.guard(optax.adam(0.1), sg.skip(), sg.halt(after=3))
    norms = [1.0] + [np.nan] * 30
    params, state, (trail, seen, _) = scan(tx, of_norm(norms), PARAMS)
    np.testing.assert_array_equal(params["w"], trail["w"][0])
    np.testing.assert_array_equal(seen["halted"][:4], [False, False, False, True])
    assert seen["halted"][3:].all()
    assert sg.metrics(state)["halted_steps"] == 28
    with pytest.raises(sg.TrainingHalted, match="halted at step 30: 30 steps in a row"):
        sg.raise_if_halted(state)


@pytest.mark.slow
def test_one_good_step_clears_the_flag_and_trains_on():
    norms = [1.0, np.nan, np.nan, np.nan, 1.0]
    tx = sg.guard(optax.sgd(0.1), sg.skip(), sg.halt(after=2))
    _, state, (trail, seen, _) = scan(tx, of_norm(norms), PARAMS)
    np.testing.assert_array_equal(seen["halted"], [False, False, True, True, False])
    assert (trail["w"][-1] != trail["w"][-2]).all()
    sg.raise_if_halted(state)
    assert sg.metrics(state)["halted_steps"] == 2


@pytest.mark.slow
def test_finite_outliers_never_halt():
    tx = sg.guard(
        optax.sgd(0.1), sg.skip(sg.fixed(2.0), max_consecutive=30), sg.halt(after=5)
    )
    _, _, (_, seen, _) = scan(tx, of_norm([1.0] + [9.0] * 25), PARAMS)
    assert seen["skipped"][1:].all()
    assert not seen["halted"].any()


@pytest.mark.slow
def test_nonfinite_steps_count_across_outliers_until_one_is_taken():
    norms = [1.0, np.nan, 9.0, np.nan, 1.0, np.nan]
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(2.0)), sg.halt(after=2))
    _, _, (_, seen, _) = scan(tx, of_norm(norms), PARAMS)
    np.testing.assert_array_equal(seen["halted"], [0, 0, 0, 1, 0, 0])


@pytest.mark.slow
def test_a_guard_without_halt_never_halts():
    tx = sg.guard(optax.sgd(0.1), sg.skip())
    _, state, _ = scan(tx, of_norm(np.full(50, np.nan)), PARAMS)
    sg.raise_if_halted(state)


@pytest.mark.slow
def test_the_exception_names_the_members_of_an_ensemble():
    tx = sg.guard(optax.sgd(0.1), sg.skip(), sg.halt(after=1))
    params = {"w": jnp.zeros((3, 2))}
    grads = {"w": jnp.ones((3, 2)).at[1, 0].set(jnp.nan)}
    state = jax.vmap(tx.init)(params)
    updates, state = jax.jit(jax.vmap(tx.update))(grads, state, params)
    with pytest.raises(sg.TrainingHalted, match=r"ensemble members \[1\]") as stopped:
        sg.raise_if_halted(state)
    alone = jax.jit(tx.update)({"w": grads["w"][1]}, tx.init({"w": jnp.zeros(2)}))[1]
    with pytest.raises(sg.TrainingHalted) as single:
        sg.raise_if_halted(alone)
    assert str(stopped.value).endswith(f"the first of them:\n{single.value}")
    assert "since step 0 (nonfinite gradient)" in str(single.value)
    chex.assert_tree_all_finite(updates)
    np.testing.assert_allclose(updates["w"][0], -0.1)


def message_of(tx, norms, values, poison=False):
    """What is said of a run whose losses are `values`, by `apply`."""

    def one(carry, xs):
        params, state = carry
        grads = {"w": xs[0] * jnp.array([0.6, 0.8])}
        broken = {"w": jnp.full(2, jnp.inf)}
        choose = lambda tree: jax.tree.map(
            lambda x, bad: jnp.where(poison & (xs[1] > 9), bad, x), tree, broken
        )
        grads, params = choose(grads), choose(params)
        return sg.apply(tx, grads, state, params, value=xs[1]), None

    rows = jnp.float32(norms), jnp.float32(values)
    scan = lambda rows: jax.lax.scan(one, (PARAMS, tx.init(PARAMS)), rows)[0]
    with pytest.raises(sg.TrainingHalted) as stopped:
        sg.raise_if_halted(jax.jit(scan)(rows)[1])
    return str(stopped.value)


@pytest.mark.slow
def test_trouble_that_roll_back_could_not_end_is_dated_from_the_first_of_them():
    back = sg.roll_back(
        sg.fixed(10.0, of="value"),
        after=3,
        every=8,
        hold_steps=2,
        cooldown_steps=2,
        limit=2,
    )
    values = np.where(np.arange(39) < 30, 1.0, 100.0)
    text = message_of(sg.guard(optax.sgd(1e-2), sg.skip(), back), np.ones(39), values)
    assert "there is trouble since step 32 or earlier" in text
    assert "tried: 2 steps skipped since the start, rolled back 2 times" in text


@pytest.mark.slow
def test_parameters_that_break_again_after_each_roll_back_are_said_to():
    tx = sg.stabilize(optax.adam(1e-2), sg.roll_back())
    values = np.where(np.arange(60) < 30, 1.0, 10.0)
    text = message_of(tx, np.ones(60), values, poison=True)
    assert "that were restored broke again" in text and "with `roll_back()`" not in text


@pytest.mark.slow
def test_a_roll_back_that_needs_apply_says_so_after_others_that_did_not():
    high = sg.fixed(10.0, of="value")
    back = sg.roll_back(high, after=1, every=8, hold_steps=2, cooldown_steps=0)
    tx = sg.guard(optax.sgd(0.1), sg.skip(), back)
    update = jax.jit(lambda g, s, p, loss: tx.update(g, s, p, value=loss))
    _, state = update(PARAMS, tx.init(PARAMS), PARAMS, 100.0)
    assert sg.metrics(state)["roll_backs"] == 1
    broken = {"w": jnp.full(2, jnp.nan)}
    _, state = update(broken, state, broken, 1.0)
    with pytest.raises(sg.TrainingHalted, match=r"back to it: use `stablegrad\.apply`"):
        sg.raise_if_halted(state)


@pytest.mark.slow
@pytest.mark.parametrize("calm, blamed", [(5, True), (99, True), (100, False)])
def test_the_account_blames_a_blow_up_shortly_before_the_halt(calm, blamed):
    # A spike at step 1, calm steps, then nothing that is finite.
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(2.0)), sg.halt(after=3))
    norms = [1.0, 9.0, *[1.0] * calm, *[np.nan] * 3]
    _, state, _ = scan(tx, of_norm(norms), PARAMS)
    with pytest.raises(sg.TrainingHalted) as error:
        sg.raise_if_halted(state)
    advice = "next: lower the learning rate, or add `roll_back()`: grad_norm was above"
    assert (advice in str(error.value)) == blamed
    assert "limit from step 1 on" in str(error.value) or not blamed
    assert "look at the batches of these steps" in str(error.value)


@pytest.mark.slow
def test_the_account_blames_no_blow_up_where_only_bad_numbers_were_seen():
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(2.0)), sg.halt(after=3))
    _, state, _ = scan(tx, of_norm([1.0, np.inf, np.inf, np.inf]), PARAMS)
    with pytest.raises(sg.TrainingHalted, match=r"next: look|next: lower the .* scale"):
        sg.raise_if_halted(state)


def test_rejects_arguments_out_of_range():
    with pytest.raises(ValueError, match="`after` must be .*, got 0"):
        sg.halt(after=0)
