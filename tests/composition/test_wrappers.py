"""Optax's wrappers around a guard and inside it, and chains of chains."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.composing import (
    NAN_STEP,
    SPIKE_STEP,
    assert_survived,
    assert_untouched,
    dies,
    guarded,
    start,
    train,
    without_loss,
)

import stablegrad as sg

ADAM = optax.adam(0.05)
FALLING = optax.linear_schedule(0.1, 0.01, 100)
TRAINED = {"first": True, "last": {"bias": False, "kernel": True}}
FROZEN = jax.tree.map(lambda flag: not flag, TRAINED)
LABELS = {"first": "first", "last": "last"}


def in_first_kernel(grad_fn, params, batch, fault):
    """A fault of one leaf's gradient."""
    loss, grads = grad_fn(params, batch)
    first = {**grads["first"], "kernel": grads["first"]["kernel"] * fault}
    return loss, {**grads, "first": first}


def in_last_bias(grad_fn, params, batch, fault):
    loss, grads = grad_fn(params, batch)
    last = {**grads["last"], "bias": grads["last"]["bias"] * fault}
    return loss, {**grads, "last": last}


@pytest.mark.slow
def test_injected_hyperparameters_wait_while_a_step_is_rejected():
    inner = optax.inject_hyperparams(optax.adam)(learning_rate=FALLING)
    assert dies(inner)
    run = train(guarded(inner))
    assert_survived(run)
    for step in (NAN_STEP, SPIKE_STEP):
        assert_untouched(run, step)
    rates = sg.unwrap(run.history[1]).hyperparams["learning_rate"]
    assert rates[NAN_STEP] == rates[NAN_STEP - 1] > rates[NAN_STEP + 1]


@pytest.mark.slow
def test_a_rate_in_a_guarded_state_can_be_set_between_steps():
    tx = guarded(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    params = start()
    state = tx.init(params)
    state.guarded_inner.hyperparams["learning_rate"] = jnp.asarray(0.5)
    updates, _ = jax.jit(tx.update)(params, state, params)
    kernel = lambda tree: tree["last"]["kernel"]
    np.testing.assert_allclose(kernel(updates), -0.5 * kernel(params), rtol=1e-6)


@pytest.mark.slow
def test_a_guard_and_its_optimizer_can_be_built_by_inject_hyperparams():
    @optax.inject_hyperparams
    def make(learning_rate, skip_z):
        inner = optax.adam(learning_rate)
        return sg.guard(inner, sg.skip(sg.nonfinite(), sg.zscore(skip_z)))

    run = train(make(learning_rate=FALLING, skip_z=6.0))
    assert_survived(run)
    rates = run.history[1].hyperparams["learning_rate"]
    assert rates[NAN_STEP] > rates[NAN_STEP + 1]  # Its count is outside the guard.


@pytest.mark.slow
def test_a_guard_around_masks_judges_frozen_leaves_too():
    inner = optax.chain(
        optax.masked(ADAM, TRAINED), optax.masked(optax.set_to_zero(), FROZEN)
    )
    run = train(guarded(inner), spoil=in_last_bias)
    assert_survived(run)
    for step in (NAN_STEP, SPIKE_STEP):
        assert_untouched(run, step)
    chex.assert_trees_all_equal(run.params["last"]["bias"], start()["last"]["bias"])


@pytest.mark.slow
def test_a_guard_inside_a_mask_judges_only_its_own_leaves():
    tx = optax.chain(
        optax.masked(guarded(ADAM), TRAINED),
        optax.masked(optax.set_to_zero(), FROZEN),
    )

    def nan_where_frozen(grad_fn, params, batch, fault):
        frozen = in_last_bias(grad_fn, params, batch, fault)
        trained = in_first_kernel(grad_fn, params, batch, fault)
        return optax.tree.where(jnp.isnan(fault), frozen, trained)

    run = train(tx, spoil=nan_where_frozen)
    assert_survived(run, skipped=1)
    assert sg.events(run.state)[0].step == SPIKE_STEP


@pytest.mark.slow
def test_what_a_mask_leaves_out_is_not_guarded_by_a_guard_inside_it():
    tx = optax.chain(
        optax.masked(guarded(optax.scale_by_adam()), TRAINED), optax.scale(-0.05)
    )
    assert dies(tx)  # The nan reaches the bias, which no guard sees.


@pytest.mark.slow
def test_a_guard_around_a_partition_holds_all_groups():
    inner = optax.partition({"first": ADAM, "last": optax.sgd(0.05)}, LABELS)
    assert dies(inner)
    run = train(guarded(inner), spoil=in_first_kernel)
    assert_survived(run)
    for step in (NAN_STEP, SPIKE_STEP):
        assert_untouched(run, step)


@pytest.mark.slow
def test_a_guard_in_each_group_of_a_partition_holds_its_own():
    groups = {"first": guarded(ADAM), "last": guarded(optax.sgd(0.05))}
    run = train(optax.partition(groups, LABELS), spoil=in_first_kernel)
    chex.assert_tree_all_finite((run.params, run.state))
    seen = sg.metrics(run.state)
    assert (seen["guard_0_skipped_steps"], seen["guard_1_skipped_steps"]) == (2, 0)
    (before, _), (after, _) = run.at(NAN_STEP - 1), run.at(NAN_STEP)
    chex.assert_trees_all_equal(after["first"], before["first"])
    assert (after["last"]["kernel"] != before["last"]["kernel"]).any()
    assert run.last < 0.1


@pytest.mark.slow
def test_a_guard_deep_in_a_chain_of_chains_trains_and_is_found():
    adamw = optax.chain(optax.chain(optax.scale_by_adam()), optax.scale(-0.05))
    inner = optax.chain(optax.add_decayed_weights(1e-4), adamw)
    tx = optax.chain(
        optax.identity(),
        optax.chain(optax.chain(guarded(inner)), optax.scale(1.0)),
    )
    assert dies(inner)
    run = train(tx)
    assert_survived(run)
    for step in (NAN_STEP, SPIKE_STEP):
        state_of = lambda step: run.at(step)[1][1][0][0].guarded_inner
        chex.assert_trees_all_equal(state_of(step), state_of(step - 1))
        chex.assert_trees_all_equal(run.at(step)[0], run.at(step - 1)[0])
    assert [event.step for event in sg.events(run.state)] == [NAN_STEP, SPIKE_STEP]


@pytest.mark.slow
def test_lookahead_trains_with_a_guard_on_its_fast_optimizer():
    lookahead = lambda tx: optax.lookahead(tx, sync_period=5, slow_step_size=0.5)
    settings = {
        "params": optax.LookaheadParams.init_synced(start()),
        "fast": lambda params: params.fast,
        "extra": without_loss,
    }
    assert dies(lookahead(ADAM), **settings)
    run = train(lookahead(guarded(ADAM)), **settings)
    chex.assert_tree_all_finite((run.params, run.state))
    assert sg.metrics(run.state)["skipped_steps"] == 2
    for step in (NAN_STEP, SPIKE_STEP):  # Neither is a step that synchronises.
        chex.assert_trees_all_equal(run.at(step)[0], run.at(step - 1)[0])
    assert run._replace(params=run.params.slow).last < 0.1


def test_a_guard_around_lookahead_says_that_gradients_are_of_the_fast_half_only():
    tx = guarded(optax.lookahead(ADAM, sync_period=5, slow_step_size=0.5))
    params = optax.LookaheadParams.init_synced(start())
    with pytest.raises(ValueError, match="missing: fast.first.bias"):
        jax.eval_shape(tx.update, params.fast, tx.init(params), params)


def test_a_rate_set_in_what_unwrap_returns_is_set_in_the_guard():
    params = jnp.ones(2)
    tx = optax.chain(
        optax.identity(),
        sg.guard(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)),
    )
    state = tx.init(params)
    sg.unwrap(state)[1].hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, _ = tx.update(params, state, params)
    assert not updates.any()
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rate = sg.unwrap(optimizer.opt_state)[1].hyperparams["learning_rate"]
    assert rate is optimizer.opt_state[1].guarded_inner.hyperparams["learning_rate"]
