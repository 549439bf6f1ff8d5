"""JAX's own transformations around a guarded step: scan, remat, donation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.composing import (
    FAULTS,
    NAN_STEP,
    SPIKE_STEP,
    X,
    Y,
    assert_survived,
    assert_untouched,
    guarded,
    loss_fn,
    start,
    train,
)
from helpers.marking import core
from jax.experimental import checkify

import stablegrad as sg

ADAM = optax.adam(0.05)
CLOSE = 1e-4  # Two programs round differently, and 120 steps carry it on.


def one_step(tx, params, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, (x, y))
    return sg.apply(tx, grads, state, params, value=loss)


@pytest.mark.slow
def test_a_scan_over_steps_does_what_a_loop_does():
    tx = guarded(ADAM)
    looped = train(tx)
    assert_survived(looped)
    for step in (NAN_STEP, SPIKE_STEP):
        assert_untouched(looped, step)

    @jax.jit
    def scan(params):
        step = lambda carry, batch: (one_step(tx, *carry, *batch), None)
        batches = (X, Y * FAULTS[:, None, None])
        return jax.lax.scan(step, (params, tx.init(params)), batches)[0]

    params, state = scan(start())
    chex.assert_trees_all_close(params, looped.params, rtol=CLOSE, atol=CLOSE)
    scanned, found = sg.metrics(state), sg.metrics(looped.state)
    for name in ("guarded_steps", "skipped_steps"):
        assert scanned[name] == found[name]


def rematerialised(params, batch):
    """The same loss, whose layers keep nothing for the backward pass."""
    x, y = batch

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def hidden(layer, x):
        return jnp.tanh(x @ layer["kernel"] + layer["bias"][None])

    last = params["last"]
    out = hidden(params["first"], x) @ last["kernel"] + last["bias"][None]
    return jnp.mean((out - y) ** 2)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_for_a_guard_that_looks_ahead():
    tx = sg.guard(ADAM, sg.skip(), sg.trust_region(every=2, probe="hvp"))
    runs = []
    for loss_of in (loss_fn, rematerialised):

        def spoilt(grad_fn, params, batch, fault, loss_of=loss_of):
            del grad_fn
            return jax.value_and_grad(loss_of)(params, (batch[0], batch[1] * fault))

        def again(batch, loss, grads, loss_of=loss_of):
            del grads
            return {"value": loss, "value_fn": lambda params: loss_of(params, batch)}

        faults = np.where(np.isnan(FAULTS), FAULTS, 1)
        runs.append(train(tx, faults, spoil=spoilt, extra=again))
    for run in runs:
        assert_survived(run, skipped=1)
        assert_untouched(run, NAN_STEP)
    plain, remat = (sg.metrics(run.state) for run in runs)
    assert remat["trust_probes"] == plain["trust_probes"] > 10
    chex.assert_trees_all_close(runs[1].params, runs[0].params, rtol=CLOSE, atol=CLOSE)


DONATED = {
    "adam": ADAM,
    "multi steps": optax.MultiSteps(ADAM, 2),
    "schedule free": optax.contrib.schedule_free_sgd(0.1),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "lbfgs": optax.lbfgs(memory_size=2, linesearch=None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DONATED)
def test_parameters_and_state_can_be_donated_from_the_first_step_on(name):
    tx = guarded(DONATED[name])
    step = jax.jit(functools.partial(one_step, tx), donate_argnums=(0, 1))
    params = start()
    state = tx.init(params)
    for fault in (1.0, jnp.nan, 1.0):
        given = (params, state)
        params, state = step(params, state, X[0], Y[0] * fault)
        assert all(x.is_deleted() for x in jax.tree.leaves(given[0]))
        moments = jax.tree.leaves(given[1].guarded_inner)
        assert all(x.is_deleted() for x in moments)
    assert sg.metrics(state)["skipped_steps"] == 1
    chex.assert_tree_all_finite((params, state))


QUADRATIC = {"w": jnp.ones(3)}


def quadratic_step(tx, params, state, with_value=True):
    """A step on a quadratic loss."""
    loss_fn = lambda params: jnp.sum((params["w"] - 2.0) ** 2)
    loss, grads = jax.value_and_grad(loss_fn)(params)
    value = {"value": loss} if with_value else {}
    return sg.apply(tx, grads, state, params, **value)


STRICT = {
    "stabilize": lambda: sg.stabilize(optax.sgd(0.1)),
    "roll_back": lambda: sg.stabilize(optax.sgd(0.1), sg.roll_back()),
    "clip_by_zscore": sg.clip_by_zscore,
    "clip_by_ema": sg.clip_by_ema,
    "clip_by_percentile": sg.clip_by_percentile,
    "clip_by_max": sg.clip_by_max,
    "clip_update_rms": sg.clip_update_rms,
}


@pytest.mark.parametrize("name", core(STRICT, "clip_by_zscore", "clip_by_max"))
def test_strict_dtype_promotion_is_passed(name, strict):
    tx = STRICT[name]()
    update = functools.partial(optax.with_extra_args_support(tx).update, value=None)
    updates = jax.eval_shape(update, QUADRATIC, tx.init(QUADRATIC), QUADRATIC)[0]
    assert updates["w"].dtype == jnp.float32


@pytest.mark.slow
def test_checkify_finds_nothing_in_a_healthy_step():
    tx = sg.stabilize(optax.adam(0.1))
    step = functools.partial(quadratic_step, tx)
    checked = jax.jit(checkify.checkify(step, errors=checkify.float_checks))
    error, (params, _) = checked(QUADRATIC, tx.init(QUADRATIC))
    assert error.get() is None
    assert (params["w"] > 1).all()


@pytest.mark.slow
def test_debug_nans_and_debug_infs_find_nothing_in_a_healthy_run():
    tx = sg.stabilize(optax.adam(0.1))
    step = jax.jit(functools.partial(quadratic_step, tx), static_argnums=2)
    state = tx.init(QUADRATIC)
    with jax.debug_nans(True):
        with pytest.warns(UserWarning, match="got no `value=`"):
            _, without = step(QUADRATIC, state, False)
        assert np.isnan(sg.metrics(without)["loss_value"])
        _, state = step(QUADRATIC, state, True)
    with jax.debug_infs(True):
        responses = sg.roll_back(), sg.layer_health()
        sg.stabilize(optax.sgd(0.1), *responses, record_norms=2).init(QUADRATIC)
        limits = [x for k, x in sg.metrics(state).items() if k.endswith("_limit")]
    assert np.isinf(limits).any()


def test_a_guard_can_be_handed_through_a_pytree_as_equinox_does():
    tx = jax.tree.map(lambda function: function, guarded(ADAM))
    params = start()
    jax.eval_shape(lambda p: sg.apply(tx, p, tx.init(p), p), params)
