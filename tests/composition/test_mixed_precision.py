"""Float16 passes with a dynamic loss scale that reads the guard's record."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.composing import guarded
from recipes import mixed_precision as recipe

import stablegrad as sg

pytestmark = pytest.mark.slow

STEPS, NAN_STEP, START = 160, 70, 2.0**22
HALF = 0.02  # Float16 rounds to 5e-4, some dozen times a pass.
X = jax.random.normal(jax.random.key(0), (STEPS, 32, 4)).at[NAN_STEP].set(jnp.nan)


def parameters():
    first = 0.5 * jax.random.normal(jax.random.key(1), (4, 16))
    return {"in": first, "out": jnp.zeros((16, 1))}


def scale_of(factor):
    return recipe.LossScale(jnp.float32(factor), jnp.int32(0))


@pytest.fixture(scope="module")
def run():
    """The recipe's steps in one scan, with a shorter wait between doublings."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return scan_steps(monkeypatch)


def scan_steps(monkeypatch):
    monkeypatch.setattr(recipe, "tx", guarded(optax.adam(0.02)))
    monkeypatch.setattr(recipe, "DOUBLE_AFTER", 12)

    def step(carry, x):
        params, state, scale = carry
        params, state, scale, loss = recipe.train_step.__wrapped__(*carry, x)
        seen = sg.metrics(state)
        return (params, state, scale), (params, state.guarded_inner, scale, loss, seen)

    def scan(params):
        carry = (params, recipe.tx.init(params), scale_of(START))
        return jax.lax.scan(step, carry, X)

    (params, state, _), history = jax.jit(scan)(parameters())
    return params, state, jax.device_get(history)


def test_the_scale_halves_at_an_overflow_and_doubles_after_good_steps(run):
    _, state, (_, _, scales, losses, seen) = run
    factor, good, expected = START, 0, []
    for skipped, loss in zip(seen["skipped"], losses, strict=True):
        if skipped and np.isfinite(loss):
            factor, good = factor / 2, 0
        elif not skipped:
            good += 1
        if good == 12:
            factor, good = 2 * factor, 0
        expected.append(factor)
    np.testing.assert_array_equal(scales.factor, expected)
    ratios = scales.factor[1:] / scales.factor[:-1]
    assert (ratios == 2).sum() >= 3 and (ratios == 0.5).sum() >= 6
    assert scales.factor[NAN_STEP] == scales.factor[NAN_STEP - 1]
    halved = 1 + (ratios == 0.5).sum()  # The first step, too, halves it.
    assert sg.metrics(state)["skipped_steps"] == halved + 1


def test_training_gets_through_overflows_and_a_nan_batch_unharmed(run):
    params, state, (all_params, inner, _, losses, seen) = run
    chex.assert_tree_all_finite((params, state))
    assert np.mean(losses[-20:]) < 0.05 < losses[0]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(losses)), [NAN_STEP])
    row = lambda tree, step: jax.tree.map(lambda leaf: leaf[step], tree)
    first, *others = np.flatnonzero(seen["skipped"])
    assert first == 0
    chex.assert_trees_all_equal(row(all_params, 0), parameters())
    for step in others:
        chex.assert_trees_all_equal(row(all_params, step), row(all_params, step - 1))
        chex.assert_trees_all_equal(row(inner, step), row(inner, step - 1))


def test_the_guard_sees_gradients_of_the_loss_whatever_the_scale(run):
    _, _, (all_params, _, _, _, seen) = run
    taken = np.flatnonzero(~seen["skipped"])[1:]
    before = jax.tree.map(lambda leaf: leaf[taken - 1], all_params)
    grads = jax.jit(jax.vmap(jax.grad(recipe.loss_fn)))(before, X[taken])
    norms = jax.vmap(optax.tree.norm)(grads)
    np.testing.assert_allclose(seen["grad_norm"][taken], norms, rtol=HALF)


def test_without_a_guard_the_first_overflow_ends_the_run():
    tx = optax.adam(0.02)

    @jax.jit
    def step(params):
        scaled = lambda params: START * recipe.loss_fn(params, X[0])
        grads = jax.tree.map(lambda grad: grad / START, jax.grad(scaled)(params))
        return sg.apply(tx, grads, tx.init(params), params)[0]

    assert not np.isfinite(step(parameters())["out"]).all()
