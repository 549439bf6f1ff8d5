"""Gradient accumulation: `optax.MultiSteps` inside a guard and outside."""

import chex
import jax
import numpy as np
import optax
import pytest
from helpers.composing import (
    CLEAN,
    FAULTS,
    NAN_STEP,
    SPIKE_STEP,
    STEPS,
    assert_survived,
    assert_untouched,
    dies,
    guarded,
    moved,
    open_to_extra,
    start,
    train,
)

import stablegrad as sg

K = 4
ADAM = optax.adam(0.1)
ONE_NAN = np.where(np.isnan(FAULTS), FAULTS, CLEAN)


def several(tx, **settings):
    return optax.MultiSteps(tx, K, **settings)


@pytest.mark.slow
def test_a_nan_micro_batch_does_not_kill_the_accumulator():
    assert dies(several(ADAM))
    run = train(guarded(several(ADAM)))
    assert_survived(run)
    for step in (NAN_STEP, SPIKE_STEP):
        assert_untouched(run, step)
    inner = run.state.guarded_inner
    assert inner.gradient_step == (STEPS - 2) // K
    assert inner.mini_step == (STEPS - 2) % K


@pytest.mark.slow
def test_the_good_micro_batches_of_a_group_are_all_used():
    # One more micro-batch completes the group, as if the bad one had never been.
    run = train(guarded(several(ADAM)))
    good = np.delete(np.arange(STEPS), [NAN_STEP, SPIKE_STEP])
    np.testing.assert_array_equal(np.flatnonzero(moved(run)) + 1, good[K - 1 :: K])


@pytest.mark.slow
def test_a_guard_inside_cannot_save_an_accumulator_that_holds_a_nan():
    run = train(open_to_extra(several(guarded(ADAM))), ONE_NAN)
    assert not moved(run)[NAN_STEP:].any()
    assert np.isnan(jax.tree.leaves(run.state.acc_grads)[0]).all()
    chex.assert_tree_all_finite(run.params)
    left = STEPS // K - NAN_STEP // K
    assert sg.metrics(run.state)["skipped_steps"] == left  # Every update from then on.


@pytest.mark.slow
def test_skip_not_finite_keeps_the_nan_out_of_an_accumulator_outside():
    tx = several(guarded(ADAM), should_skip_update_fn=optax.skip_not_finite)
    run = train(open_to_extra(tx), ONE_NAN)
    assert_survived(run, skipped=0)  # The guard inside never sees it.
    params, state = run.at(NAN_STEP)
    assert state.skip_state["should_skip"]
    before, held = run.at(NAN_STEP - 1)
    chex.assert_trees_all_equal(params, before)
    chex.assert_trees_all_equal(
        state._replace(skip_state=0), held._replace(skip_state=0)
    )
    assert run.state.gradient_step == (STEPS - 1) // K


@pytest.mark.slow
def test_a_finite_outlier_costs_a_guard_inside_the_whole_group():
    tx = several(guarded(ADAM), should_skip_update_fn=optax.skip_not_finite)
    run = train(open_to_extra(tx))
    assert_survived(run, skipped=1)
    assert run.state.gradient_step == (STEPS - 1) // K
    assert moved(run).sum() == (STEPS - 1) // K - 1  # Three good micro-batches lost.


@pytest.mark.slow
def test_a_clip_before_the_accumulator_judges_every_micro_batch():
    clip = sg.clip_by_zscore(2.5)
    tx = optax.chain(clip, open_to_extra(several(guarded(ADAM))))
    run = train(tx)
    assert_survived(run, skipped=0)
    seen = sg.metrics(run.state)
    assert seen["clip_by_zscore_dropped_steps"] == 1
    clipped = sg.metrics(run.at(SPIKE_STEP)[1])
    assert clipped["clip_by_zscore_scale"] < 1e-2
    assert moved(run).sum() == STEPS // K  # A nan counts as a micro-batch of zeros.


def test_multi_steps_passes_the_loss_on_unless_it_is_a_plain_transformation():
    tx = several(sg.guard(ADAM, sg.skip(sg.nonfinite(of="value"))))
    params = start()
    step = lambda tx: sg.apply(tx, params, tx.init(params), params, value=1.0)
    for open_one in (tx, open_to_extra(tx)):
        jax.eval_shape(lambda open_one=open_one: step(open_one))
    with pytest.raises(ValueError, match="the step got no `value=`"):
        jax.eval_shape(lambda: step(tx.gradient_transformation()))


def test_an_optimizer_within_multi_steps_within_a_guard_gets_the_loss():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(extra)
        return jax.tree.map(lambda g: -value * g, updates), state

    asks = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = sg.stabilize(optax.MultiSteps(asks, 1))
    params = start()
    updates, _ = tx.update(params, tx.init(params), params, value=2.0, other=1.0)
    expected = jax.tree.map(lambda p: -2.0 * p, params)
    chex.assert_trees_all_close(updates, expected)
    assert "other" in seen[0]
