"""`optax.contrib`: schedule-free, Muon and SAM, guarded."""

import chex
import jax
import numpy as np
import optax
import pytest
from helpers.composing import (
    NAN_STEP,
    SPIKE_STEP,
    X,
    Y,
    assert_survived,
    assert_untouched,
    dies,
    guarded,
    loss_fn,
    start,
    train,
)

import stablegrad as sg

SGD = optax.sgd(0.1)
TO_EDGE = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
HALF = sg.back_off(sg.fixed(0.5, of="value"), factor=0.5)
RMS = optax.chain(
    optax.scale_by_rms(decay=0.999, eps_in_sqrt=False, bias_correction=True),
    optax.scale(-0.1),
)


def schedule_free(base):
    return optax.contrib.schedule_free(base, learning_rate=0.1)


def transparent_sam(tx):
    """SAM with an update a pass; as a plain transformation it is given no `value=`."""
    return optax.GradientTransformation(*optax.contrib.sam(tx, TO_EDGE))


def opaque_sam(tx):
    """SAM with both passes in one update, for which it takes `grad_fn=` alone."""
    sam = optax.contrib.sam(tx, TO_EDGE, opaque_mode=True)

    def update_fn(updates, state, params=None, *, grad_fn, **extra):
        del extra
        return sam.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(sam.init, update_fn)


def second_pass(batch, loss, grads):
    """What opaque SAM needs: the gradient at other parameters, on the same batch."""
    del grads
    return {
        "value": loss,
        "grad_fn": jax.grad(lambda params, _: loss_fn(params, batch)),
    }


def two_steps(tx):
    """Two steps along the same gradient; `HALF` halves the second."""

    @jax.jit
    def run(params):
        state, moved = tx.init(params), params
        for _ in range(2):
            moved, state = sg.apply(tx, params, state, moved, value=1.0)
        return moved, state

    return run


@pytest.mark.slow
def test_schedule_free_is_evaluated_through_the_state_of_its_guard():
    assert dies(schedule_free(RMS))
    run = train(guarded(schedule_free(RMS)))
    assert_survived(run)
    for step in (NAN_STEP, SPIKE_STEP):
        assert_untouched(run, step)
    evaluated = optax.contrib.schedule_free_eval_params(
        sg.unwrap(run.state), run.params
    )
    assert run._replace(params=evaluated).last < 0.05


@pytest.mark.slow
def test_schedule_free_trains_with_a_guard_on_its_base_optimizer():
    run = train(schedule_free(guarded(RMS)))
    assert_survived(run)
    (_, before), (_, after) = run.at(NAN_STEP - 1), run.at(NAN_STEP)
    chex.assert_trees_all_equal(after.z, before.z)
    evaluated = optax.contrib.schedule_free_eval_params(run.state, run.params)
    assert run._replace(params=evaluated).last < 0.05


@pytest.mark.slow
def test_a_lowered_rate_reaches_the_steps_of_schedule_free_only_from_inside():
    params, moves = start(), {}
    for name, tx in {
        "bare": schedule_free(SGD),
        "around": sg.guard(schedule_free(SGD), HALF),
        "inside": schedule_free(sg.guard(SGD, HALF)),
    }.items():
        _, state = two_steps(tx)(params)
        z = getattr(state, "guarded_inner", state).z
        moves[name] = z["first"]["kernel"] - params["first"]["kernel"]
    # Two programs, which XLA rounds in their own ways.
    np.testing.assert_allclose(moves["around"], moves["bare"], rtol=2e-6)
    np.testing.assert_allclose(moves["inside"], 0.75 * moves["bare"], rtol=1e-4)


@pytest.mark.slow
def test_muon_trains_through_the_faults_in_its_own_and_its_adam_leaves():
    muon = optax.contrib.muon(0.02)
    assert dies(muon)
    run = train(guarded(muon))
    assert_survived(run)
    for step in (NAN_STEP, SPIKE_STEP):
        assert_untouched(run, step)


@pytest.mark.slow
def test_a_guard_around_transparent_sam_rejects_either_of_its_two_passes():
    assert dies(transparent_sam(SGD))
    run = train(guarded(transparent_sam(SGD)))
    assert_survived(run)
    for step in (NAN_STEP, SPIKE_STEP):
        assert_untouched(run, step)
    # After 118 passes that were taken the parameters are at a minimum, not at an edge.
    assert run.state.guarded_inner.steps_since_sync == 0
    phases = run.history[1].guarded_inner.steps_since_sync
    assert phases[NAN_STEP] == phases[NAN_STEP - 1] != phases[NAN_STEP + 1]


@pytest.mark.slow
def test_a_lowered_rate_keeps_transparent_sam_from_coming_back_from_its_edge():
    # The second update should undo all of the first, 0.05 long, and is halved.
    params = start()
    away, _ = two_steps(sg.guard(transparent_sam(optax.sgd(0.0)), HALF))(params)
    distance = optax.tree.norm(optax.tree.sub(away, params))
    np.testing.assert_allclose(distance, 0.025, rtol=1e-4)


@jax.jit
def after_one_step(params):
    """SAM's first step: along the gradient 0.05 uphill."""
    grad_fn = jax.grad(lambda params: loss_fn(params, (X[0], Y[0])))
    grads = grad_fn(params)
    edge = optax.tree.add_scale(params, 0.05 / optax.tree.norm(grads), grads)
    return optax.tree.add_scale(params, -0.1, grad_fn(edge))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["around", "inside"])
def test_opaque_sam_is_guarded_around_and_inside(place):
    if place == "around":
        tx = sg.stabilize(opaque_sam(SGD))
    else:
        tx = opaque_sam(guarded(SGD))
    run = train(tx, extra=second_pass)
    assert_survived(run)
    chex.assert_trees_all_close(run.at(0)[0], after_one_step(start()), rtol=1e-4)
    for step in (NAN_STEP, SPIKE_STEP):
        (held, _), (params, _) = run.at(step - 1), run.at(step)
        chex.assert_trees_all_equal(params, held)


@pytest.mark.slow
def test_opaque_sam_dies_without_a_guard():
    assert dies(opaque_sam(SGD), extra=second_pass)


def test_sam_needs_no_wrapper_to_be_guarded_by_the_loss():
    tx = sg.stabilize(optax.contrib.sam(SGD, TO_EDGE))
    params = start()
    jax.eval_shape(lambda p: sg.apply(tx, p, tx.init(p), p, value=1.0), params)


@pytest.mark.slow
def test_a_guard_goes_behind_the_aggregation_of_gradients_by_example():
    aggregate = optax.contrib.differentially_private_aggregate(1.0, 0.1, 0)
    params = start()
    by_example = jax.tree.map(lambda p: np.ones((4, *p.shape), np.float32), params)
    behind = optax.chain(aggregate, sg.stabilize(optax.adam(0.1)))
    bare = optax.chain(aggregate, optax.adam(0.1))
    found, _ = behind.update(by_example, behind.init(params), params, value=1.0)
    wanted, _ = bare.update(by_example, bare.init(params), params)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)
    around = sg.stabilize(bare)
    with pytest.raises(ValueError, match="by example, as for `optax.contrib.dpsgd`"):
        around.update(by_example, around.init(params), params, value=1.0)
