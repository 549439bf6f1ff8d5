"""Tests for `stablegrad.layer_health`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.mapping import AXIS, mapped
from helpers.marking import core
from jax.sharding import PartitionSpec as P

import stablegrad as sg

PARAMS = {
    "block0": {"bias": jnp.zeros(3), "kernel": jnp.full((4, 3), 2.0)},
    "block1": {"kernel": jnp.full((3, 2), 0.5)},
}
NAMES = ("block0.bias", "block0.kernel", "block1.kernel")
STEPS = 60


def gradients(steps=STEPS):
    """Lognormal sizes of 10 %, with another direction every step."""
    rng = np.random.default_rng(0)

    def leaf(x):
        size = rng.lognormal(0, 0.1, (steps, *[1] * x.ndim))
        return jnp.asarray(size * rng.normal(1, 0.1, (steps, *x.shape)), jnp.float32)

    return jax.tree.map(leaf, PARAMS)


def run(grads, *responses, params=PARAMS, inner=None):
    """All steps in a scan: states after each, and the last parameters."""
    tx = sg.guard(inner or optax.sgd(0.1, momentum=0.9), *responses)

    def step(carry, grad):
        params, state = carry
        params, state = sg.apply(tx, grad, state, params)
        return (params, state), sg.metrics(state)

    last = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), grads))
    return last()


def oracle(grads, every):
    """Norm ratios and cosines by leaf in float64, and the steps that are checked."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(grads)]
    thetas = [np.asarray(x, np.float64) for x in jax.tree.leaves(PARAMS)]
    traces = [np.zeros_like(x) for x in thetas]
    norm, rows = np.linalg.norm, []
    for t in range(len(leaves[0])):
        now = []
        for i, g in enumerate(leaves):
            traces[i] = g[t] + 0.9 * traces[i]
            ratio = norm(0.1 * traces[i]) / norm(thetas[i]) if norm(thetas[i]) else 0
            thetas[i] = thetas[i] - 0.1 * traces[i]
            cosine = 0.0
            if t:
                cosine = (g[t] * g[t - 1]).sum() / (norm(g[t]) * norm(g[t - 1]))
            now.append((ratio, norm(g[t]), cosine))
        rows.append(now)
    checked = np.arange(len(rows)) // every * every + every - 1
    return np.array(rows), checked


@pytest.mark.slow
@pytest.mark.parametrize("every", core([1, 4], 4))
def test_signals_are_those_of_the_last_check_leaf_by_leaf(every):
    grads = gradients(8)
    told = run(grads, sg.layer_health(every=every, cosine=True))[1]
    expected, _ = oracle(grads, every)
    for step in range(8):
        last = (step + 1) // every * every - 1  # -1: none yet.
        for i, name in enumerate(NAMES):
            for j, signal in enumerate(("update_ratio", "grad_norm", "cosine")):
                found = told[f"layer_health_{signal}/{name}"][step]
                wanted = expected[last, i, j] if last >= 0 else 0.0
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert told["layer_health_checks"].tolist() == [
        (step + 1) // every for step in range(8)
    ]


@pytest.mark.slow
def test_it_changes_nothing():
    grads = gradients()
    grads["block1"]["kernel"] = grads["block1"]["kernel"].at[50].multiply(1e4)
    (params, state), _ = run(grads, sg.layer_health(every=2))
    (bare, _), _ = run(grads)
    chex.assert_trees_all_equal(params, bare)
    chex.assert_tree_all_finite(state)


@pytest.mark.slow
def test_a_layer_that_leaves_its_usual_range_is_named_and_no_other():
    grads = gradients()
    grads["block1"]["kernel"] = grads["block1"]["kernel"].at[50].multiply(100)
    watch = sg.layer_health(every=1, margin=4.0)
    (_, state), told = run(grads, watch, inner=optax.sgd(1e-3))
    (event,) = sg.events(state)
    assert (event.step, event.kind, event.leaf) == (50, "warn", "block1.kernel")
    assert str(event).startswith("step 50: warn, leaf block1.kernel")
    assert sg.metrics(state)["warned_steps"] == 1
    excess = told["layer_health_excess"]
    assert excess[50] > 0 and (np.delete(excess, 50) <= 0).all()
    # The margin is 4, limits are twice as wide until the hundredth check, and a layer
    # by itself must be above twice its limit.
    assert 2 < excess[50] < np.log2(100 / 4 / 2 / 2)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
def test_two_layers_above_their_limits_are_a_warning_and_one_is_none(layers):
    # Fifteen times the usual is above a limit of eight times, and below twice that.
    grads = gradients()
    for block in ("block1", "block0")[:layers]:
        grads[block]["kernel"] = grads[block]["kernel"].at[50].multiply(15)
    watch = sg.layer_health(every=1, margin=4.0)
    (_, state), _ = run(grads, watch, inner=optax.sgd(1e-3))
    warned = [event.step for event in sg.events(state)]
    assert warned == ([50] if layers == 2 else [])


@pytest.mark.slow
def test_a_spike_between_two_checks_is_not_seen():
    grads = gradients()
    grads["block1"]["kernel"] = grads["block1"]["kernel"].at[50].multiply(100)
    settings = {"every": 4, "margin": 4.0}
    plain = run(grads, sg.layer_health(**settings), inner=optax.sgd(0.1))[0][1]
    assert sg.metrics(plain)["warned_steps"] == 0
    moved = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), grads)  # Step 51 is checked.
    seen = run(moved, sg.layer_health(**settings), inner=optax.sgd(0.1))[0][1]
    assert sg.metrics(seen)["warned_steps"] == 1


@pytest.mark.slow
def test_after_a_skipped_micro_batch_checks_still_fall_on_the_updates():
    grads = gradients()
    kernel = grads["block0"]["kernel"]
    grads["block0"]["kernel"] = kernel.at[9].set(jnp.nan)
    inner = optax.MultiSteps(optax.sgd(1e-3), 4)
    (_, state), told = run(grads, sg.layer_health(every=4), inner=inner)
    ratios = told["layer_health_update_ratio/block0.kernel"]
    assert (ratios[3:] > 0).all()
    assert sg.metrics(state)["layer_health_checks"] == (STEPS - 1) // 4


@pytest.mark.slow
def test_labels_are_measured_together_and_none_is_left_out():
    grads = gradients(2)
    per = lambda path, leaf: path[0].key if leaf.ndim > 1 else None
    told = run(grads, sg.layer_health(per, every=1))[1]
    names = [name for name in told if "/" in name]
    assert sorted(names) == [
        f"layer_health_{signal}/{block}"
        for signal in ("grad_norm", "update_ratio")
        for block in ("block0", "block1")
    ]
    found = told["layer_health_grad_norm/block0"]
    wanted = np.linalg.norm(grads["block0"]["kernel"].reshape(2, -1), axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    told = run(grads, sg.layer_health("global", every=1))[1]
    np.testing.assert_allclose(
        told["layer_health_grad_norm/all"], told["grad_norm"], rtol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("bad", core([jnp.nan, jnp.inf], jnp.nan))
def test_a_rejected_step_is_not_checked_and_reaches_no_statistic(bad):
    grads = gradients(12)
    kernel = grads["block0"]["kernel"]
    grads["block0"]["kernel"] = kernel.at[5].set(bad)
    (_, state), told = run(grads, sg.layer_health(every=1, cosine=True))
    assert told["layer_health_checks"][-1] == 11
    assert not told["warned_steps"].any()
    chex.assert_tree_all_finite(state)
    # The gradient before the bad one is the one to compare the next with.
    x, y = (np.asarray(kernel[i], np.float64) for i in (4, 6))
    wanted = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    found = told["layer_health_cosine/block0.kernel"][6]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.slow
def test_the_ratio_is_that_of_the_step_as_it_is_taken():
    grads = jax.tree.map(lambda x: jnp.full((1, *x.shape), 3.0), PARAMS)
    clip = sg.clip(sg.fixed(0.5))
    told = run(grads, clip, sg.layer_health(every=1), inner=optax.sgd(1.0))[1]
    total = sum(x.size for x in jax.tree.leaves(PARAMS)) ** 0.5
    wanted = 0.5 / total / 2.0  # Of kernels of 2.0: sizes cancel.
    found = told["layer_health_update_ratio/block0.kernel"][0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
def test_an_ensemble_has_readings_and_events_by_member():
    grads = jax.tree.map(lambda x: jnp.stack([x] * 3, axis=1), gradients())
    grads["block1"]["kernel"] = grads["block1"]["kernel"].at[50, 1].multiply(100)
    tx = sg.guard(optax.sgd(1e-3), sg.layer_health(every=1, margin=4.0, cosine=True))

    @jax.vmap
    def member(grads):
        def step(carry, grad):
            params, state = carry
            return sg.apply(tx, grad, state, params), None

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), grads)[0]

    moved = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), grads)
    _, state = jax.jit(member)(moved)
    (event,) = sg.events(state)
    assert (event.member, event.step, event.leaf) == (1, 50, "block1.kernel")
    assert sg.metrics(state)["layer_health_checks"].tolist() == [STEPS] * 3


@pytest.mark.slow
@pytest.mark.devices(8)
def test_shards_are_measured_whole():
    params, grad = jnp.arange(1.0, 17.0), jnp.arange(16.0)
    settings = {"every": 1, "cosine": True}
    tx = sg.guard(optax.sgd(0.1), sg.layer_health(**settings), axis_name=AXIS)
    alone = sg.guard(optax.sgd(0.1), sg.layer_health(**settings))

    def steps(tx):
        def body(params, grad):
            state = tx.init(params)
            for _ in range(2):
                params, state = sg.apply(tx, grad, state, params)
            return sg.metrics(state)

        return body

    found = mapped(steps(tx), P(AXIS), P())(params, grad)
    chex.assert_trees_all_close(found, steps(alone)(params, grad), rtol=1e-5)


def test_wrong_arguments_are_told():
    for settings, match in (
        ({"per": "unit"}, 'must not be "unit"'),
        ({"per": "layer"}, "`per` must be one of"),
        ({"every": 0}, "`every` must be an integer >= 1"),
        ({"margin": 0.5}, "`margin` must be >= 1"),
        ({"share": 2.0}, "`share` must be in"),
    ):
        with pytest.raises(ValueError, match=match):
            sg.layer_health(**settings)
    with pytest.raises(ValueError, match="one `layer_health`, got 2"):
        sg.guard(optax.sgd(0.1), sg.layer_health(), sg.layer_health())
    tx = sg.guard(optax.sgd(0.1), sg.layer_health())
    with pytest.raises(ValueError, match="`layer_health` needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("params", [{}, {"n": jnp.arange(3)}], ids=["none", "integers"])
def test_a_tree_without_floats_is_left_alone(params):
    tx = sg.guard(optax.sgd(0.1), sg.layer_health(per="leaf"))
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_equal_shapes(updates, params)
    assert sg.metrics(state)["warned_steps"] == 0
