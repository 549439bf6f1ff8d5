"""Tests for `stablegrad.observe_metric`: a plateau fed from outside the step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from helpers.marking import core

import stablegrad as sg

PARAMS = {"w": jnp.array([1.0, 2.0])}


def plateau(**options):
    return sg.reduce_on_plateau(0.5, patience=0, **{"metric": None, **options})


NESTINGS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.scale_by_adam(), tx),
    "guard": lambda tx: sg.guard(optax.chain(tx, optax.sgd(1.0)), sg.skip()),
    "masked": lambda tx: optax.masked(tx, {"w": True}),
    "inject": lambda tx: optax.inject_hyperparams(lambda x: tx)(x=1.0),
    "multi steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "if finite": lambda tx: optax.apply_if_finite(tx, 2),
    "partition": lambda tx: optax.partition({"a": tx}, {"w": "a"}),
}


@pytest.mark.parametrize("name", core(NESTINGS, "alone", "chain"))
def test_finds_the_plateau_inside_other_transformations(name):
    before = NESTINGS[name](plateau()).init(PARAMS)
    observe = jax.jit(lambda state, value: sg.observe_metric(state, value=value))
    after = observe(observe(before, 1.0), 1.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    assert sg.metrics(after)["plateau_scale"] == 0.5
    assert sg.metrics(before)["plateau_evaluations"] == 0  # It is pure.


def test_the_next_step_is_scaled_and_steps_do_not_feed_it():
    tx = optax.chain(optax.scale(2.0), plateau())
    state = tx.init(PARAMS)
    for _ in range(2):
        state = sg.observe_metric(state, value=3.0)
        for training_loss in (9.0, 1.0):
            updates, state = tx.update(PARAMS, state, PARAMS, value=training_loss)
    np.testing.assert_array_equal(updates["w"], PARAMS["w"])
    told = sg.metrics(state)
    assert told["plateau_evaluations"] == 2 and told["plateau_best"] == 3.0


def test_observing_is_the_same_as_a_metric_passed_to_update():
    options = {"window": 2, "cooldown": 1, "start_after": 1, "mode": "max"}
    outside, inside = plateau(**options), plateau(metric="value", **options)
    values = np.random.default_rng(0).normal(size=30).astype(np.float32)
    values[[3, 4, 20]] = np.nan

    def observe(state, value):
        return sg.observe_metric(state, value=value), None

    def update(state, value):
        return inside.update(PARAMS, state, value=value)[1], None

    observed, _ = jax.lax.scan(observe, outside.init(PARAMS), values)
    updated, _ = jax.lax.scan(update, inside.init(PARAMS), values)
    assert sg.metrics(observed)["plateau_cuts"] > 2
    chex.assert_trees_all_equal(sg.metrics(observed), sg.metrics(updated))


def test_settings_that_were_traced_are_those_of_the_last_step():
    injected = optax.inject_hyperparams(sg.reduce_on_plateau, static_args="metric")
    tx = injected(factor=0.5, patience=0, metric=None)
    state = tx.init(PARAMS)
    state.hyperparams["factor"] = jnp.float32(0.25)
    _, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    for _ in range(2):
        state = sg.observe_metric(state, value=1.0)
    assert sg.metrics(state)["plateau_scale"] == 0.25


def test_every_plateau_of_a_chain_is_fed():
    tx = optax.chain(plateau(), plateau(metric="value"), plateau(mode="max"))
    state = sg.observe_metric(tx.init(PARAMS), value=2.0)
    told = sg.metrics(state)
    assert told["plateau_evaluations"] == told["plateau_3_evaluations"] == 1
    assert told["plateau_2_evaluations"] == 1


def test_a_state_without_a_plateau_is_an_error():
    with pytest.raises(ValueError, match="there is no plateau in this optimizer"):
        sg.observe_metric(optax.adam(0.1).init(PARAMS), value=1.0)


def test_a_plateau_as_it_comes_takes_a_metric_from_either_side():
    tx = sg.reduce_on_plateau(0.5, patience=1)
    _, state = tx.update(PARAMS, tx.init(PARAMS), value=1.0)
    for _ in range(2):
        state = sg.observe_metric(state, value=1.0)
    updates, _ = tx.update(PARAMS, state)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: 0.5 * x, PARAMS))


def test_a_metric_that_is_not_a_scalar_is_an_error():
    with pytest.raises(ValueError, match="`value` must be a real scalar, got shape"):
        sg.observe_metric(plateau().init(PARAMS), value=jnp.ones(3))


def nnx_training():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), plateau())
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_nnx_assigns_the_state_back(compiled):
    model, optimizer = nnx_training()

    def observe(optimizer, value):
        optimizer.opt_state = sg.observe_metric(optimizer.opt_state, value=value)

    if compiled:
        observe = nnx.jit(chex.assert_max_traces(observe, n=1))
    before = nnx.to_pure_dict(nnx.state(model))
    grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
    structure = jax.tree.structure(optimizer.opt_state)
    for value in (1.0, 1.0, jnp.nan):
        observe(optimizer, jnp.float32(value))
        optimizer.update(model, grads)
    assert jax.tree.structure(optimizer.opt_state) == structure
    told = sg.metrics(optimizer)
    assert told["plateau_scale"] == 0.5 and told["plateau_ignored_metrics"] == 1
    moved = nnx.to_pure_dict(nnx.state(model))["bias"] - before["bias"]
    np.testing.assert_allclose(moved, -0.1 * (1 + 0.5 + 0.5), rtol=1e-6)


def test_linen_takes_the_whole_train_state():
    model = linen.Dense(1)
    params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    tx = optax.chain(optax.sgd(0.1), plateau())
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for _ in range(2):
        state = sg.observe_metric(state, value=1.0)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    assert sg.metrics(state)["plateau_scale"] == 0.5
    moved = state.params["bias"] - params["bias"]
    np.testing.assert_allclose(moved, -0.05, rtol=1e-6)
