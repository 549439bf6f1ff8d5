"""Line searches, which ask for the loss again: `value=`, `grad=` and `value_fn=`."""

import chex
import jax
import jax.numpy as jnp
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
    clean_loss,
    dies,
    guarded,
    loss_fn,
    moved,
    start,
    train,
)
from helpers.marking import core

import stablegrad as sg

SEARCHES = {
    "backtracking": optax.scale_by_backtracking_linesearch(15),
    "zoom": optax.scale_by_zoom_linesearch(15),
}
every_search = pytest.mark.parametrize("name", core(SEARCHES, "backtracking"))


def asked_again(batch, loss, grads):
    """What a line search needs; the guard keeps the loss for itself and passes all."""
    value_fn = lambda params: loss_fn(params, batch)
    return {"value": loss, "grad": grads, "value_fn": value_fn}


@pytest.mark.slow
@every_search
def test_a_guard_around_a_line_search_trains_through_the_faults(name):
    inner = optax.chain(optax.sgd(1.0), SEARCHES[name])
    assert dies(inner, extra=asked_again)
    run = train(guarded(inner), extra=asked_again)
    assert_survived(run)
    for step in (NAN_STEP, SPIKE_STEP):
        assert_untouched(run, step)


@pytest.mark.slow
@every_search
def test_a_line_search_behind_a_guard_stands_still_after_one_nan(name):
    # A search that finds no finite loss sets its step length to zero, and starts the
    # next search from there.
    tx = optax.chain(guarded(optax.sgd(1.0)), SEARCHES[name])
    run = train(tx, extra=asked_again)
    assert moved(run)[: NAN_STEP - 1].all()
    assert not moved(run)[NAN_STEP - 1 :].any()
    assert run.state[1].learning_rate == 0


@pytest.mark.slow
def test_lbfgs_shares_its_value_fn_with_a_trust_region():
    lbfgs = optax.lbfgs(memory_size=3)
    assert dies(lbfgs, extra=asked_again)
    skip = sg.skip(sg.nonfinite(), sg.zscore(6.0))
    run = train(sg.guard(lbfgs, skip, sg.trust_region()), extra=asked_again)
    assert_survived(run)
    for step in (NAN_STEP, SPIKE_STEP):
        assert_untouched(run, step)
    assert sg.metrics(run.state)["trust_probes"] > 10


@pytest.mark.slow
def test_the_trust_region_of_the_preset_rests_beside_a_line_search():
    # From rest, the steps of L-BFGS grow a hundredfold; the search has checked them.
    def rosenbrock(p):
        return jnp.sum(100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2)

    kept = optax.value_and_grad_from_state(rosenbrock)

    def run(tx):
        def step(carry, _):
            params, state = carry
            value, grads = kept(params, state=state)
            asked = {"value": value, "grad": grads, "value_fn": rosenbrock}
            updates, state = tx.update(grads, state, params, **asked)
            return (optax.apply_updates(params, updates), state), value

        scanned = lambda start: jax.lax.scan(step, (start, tx.init(start)), length=70)
        return jax.jit(scanned)(jnp.full(10, -0.5))

    _, bare = run(optax.lbfgs())
    (_, state), losses = run(sg.stabilize(optax.lbfgs()))
    assert bare[-1] < 1e-4 and losses[-1] < 1e-4
    np.testing.assert_allclose(losses[:20], bare[:20], rtol=1e-3)
    assert sg.metrics(state)["trust_probes"] == 0
    assert sg.events(state) == []


@pytest.mark.slow
@pytest.mark.parametrize("guards", ["stabilize", "back_off"])
def test_the_gradient_that_lbfgs_kept_is_that_of_the_parameters(guards):
    # A guard that shortens a step leads elsewhere than the search has looked.
    def rosenbrock(p):
        return jnp.sum(100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2)

    lowered = sg.back_off(sg.fixed(1.0, of="value"), factor=0.5, min_scale=0.25)
    tx = {
        "stabilize": sg.stabilize(optax.lbfgs()),
        "back_off": sg.guard(optax.lbfgs(), lowered),
    }[guards]

    def step(carry, _):
        params, state = carry
        kept = optax.value_and_grad_from_state(rosenbrock)
        value, grads = kept(params, state=state)
        exact = jax.grad(rosenbrock)(params)
        length = jnp.maximum(jnp.linalg.norm(exact), 1e-3)
        error = jnp.linalg.norm(grads - exact) / length
        params, state = sg.apply(
            tx, grads, state, params, value=value, grad=grads, value_fn=rosenbrock
        )
        return (params, state), (error, sg.metrics(state)["lr_scale"])

    start = jnp.full(4, -0.5)

    @jax.jit
    def run(start):
        return jax.lax.scan(step, (start, tx.init(start)), length=40)

    (params, _), (errors, scales) = run(start)
    assert errors.max() < 1e-3
    assert rosenbrock(params) < 1e-6 if guards == "stabilize" else scales.min() < 1


@pytest.mark.slow
def test_a_nan_that_only_the_search_meets_moves_nothing():
    # Loss and gradient come from the last search, so the first to see the batch of a
    # step is its own search.
    tx = guarded(optax.lbfgs(memory_size=3))
    x, y = X.reshape(-1, 3), Y.reshape(-1, 1)

    def step(carry, fault):
        params, state = carry
        value_fn = lambda params: loss_fn(params, (x, y * fault))
        loss, grads = optax.value_and_grad_from_state(value_fn)(params, state=state)
        params, state = sg.apply(
            tx, grads, state, params, value=loss, grad=grads, value_fn=value_fn
        )
        seen = (loss, sg.metrics(state)["kept_out_elements"])
        return (params, state), ((params, state.guarded_inner), *seen)

    def run(params):
        faults = jnp.ones(12).at[6].set(jnp.nan)
        return jax.lax.scan(step, (params, tx.init(params)), faults)

    (params, state), found = jax.jit(run)(start())
    history, losses, kept_out = jax.device_get(found)
    assert np.isfinite(losses).all()
    np.testing.assert_array_equal(np.flatnonzero(kept_out), [6])
    (event,) = sg.events(state)
    assert (event.step, event.kind) == (6, "keep_out")
    row = lambda step: jax.tree.map(lambda leaf: leaf[step], history[0])
    chex.assert_trees_all_equal(row(6), row(5))
    assert losses[7] == losses[6] > losses[8]  # The search starts from there again.
    assert clean_loss(params) < 0.02
    chex.assert_tree_all_finite((params, state))
