"""Optax's own tools applied to a guard's state and functions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core

import stablegrad as sg

PARAMS = {"a": jnp.zeros(2), "b": jnp.ones(3)}
GUARDS = {
    "guard": lambda: sg.guard(optax.adam(1.0)),
    "stabilize": lambda: sg.stabilize(optax.adam(1.0)),
    "skip_bad_steps": lambda: sg.skip_bad_steps(optax.adam(1.0), "olmo"),
    "per leaf": lambda: sg.stabilize(optax.adam(1.0), per="leaf"),
    "layer_health": lambda: sg.guard(optax.adam(1.0), sg.layer_health(cosine=True)),
    "roll_back": lambda: sg.guard(optax.adam(1.0), sg.roll_back()),
}
every_guard = pytest.mark.parametrize("name", GUARDS)


@every_guard
def test_map_params_takes_a_tree_of_specs(name):
    tx, specs = GUARDS[name](), {"a": "A", "b": "B"}
    marked = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        tx.init(PARAMS),
        specs,
        transform_non_params=lambda _: None,
    )
    assert optax.tree.get(marked.guarded_inner, "mu") == specs
    assert optax.tree.get(marked.guarded_inner, "nu") == specs
    assert not jax.tree.leaves((marked.numbers, marked.names))


def test_get_finds_what_is_in_force_beside_snapshots():
    inner = optax.inject_hyperparams(optax.adam)(0.1)
    state = sg.stabilize(inner, sg.roll_back(keep=2)).init(PARAMS)
    assert optax.tree.get(state, "learning_rate") == jnp.float32(0.1)
    assert optax.tree.get(state, "mu").keys() == PARAMS.keys()


@pytest.mark.parametrize(
    "make",
    [
        lambda: sg.stabilize(optax.adam(0.1)),
        lambda: sg.stabilize(optax.adam(0.1), sg.roll_back()),
        sg.clip_by_max,
        sg.clip_update_rms,
        sg.clip_by_second_moment,
    ],
    ids=[
        "stabilize",
        "roll_back",
        "clip_by_max",
        "clip_update_rms",
        "clip_by_second_moment",
    ],
)
def test_init_takes_a_shape_dtype_struct(make):
    shape = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    abstract, concrete = make().init(shape), make().init(jnp.zeros((8, 4)))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    described = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert described(abstract) == described(concrete)


@pytest.mark.slow
def test_a_plateau_set_to_zeros_starts_anew():
    tx = sg.reduce_on_plateau(0.5, patience=0)
    state = optax.tree.zeros_like(tx.init(PARAMS))
    seen = []
    for value in (2.0, 1.0, 1.0):  # Better, better, not better.
        updates, state = tx.update(PARAMS, state, PARAMS, value=value)
        seen.append(float(updates["b"][0] / PARAMS["b"][0]))
    assert seen == [1.0, 1.0, 0.5]


@pytest.mark.slow
def test_a_state_set_to_zeros_trains_on():
    tx = sg.stabilize(optax.adam(0.1))

    def step(carry, _):
        params, state = carry
        return sg.apply(tx, PARAMS, state, params, value=1.0), None

    state = optax.tree.zeros_like(tx.init(PARAMS))
    (params, state), _ = jax.lax.scan(step, (PARAMS, state), length=60)
    assert (params["b"] < 0).all()
    assert sg.metrics(state)["skipped_steps"] == 0
    assert sg.events(state) == []


@pytest.mark.slow
def test_apply_takes_a_guard_with_a_wrapped_update():
    tx = sg.guard(optax.adam(0.1))
    calls = []

    def logged(*args, **extra):
        calls.append(extra)
        return tx.update(*args, **extra)

    wrapped = tx._replace(update=logged)
    params, _ = sg.apply(wrapped, PARAMS, tx.init(PARAMS), PARAMS, value=1.0)
    np.testing.assert_allclose(params["b"], 0.9, rtol=1e-5)
    assert calls == [{"value": 1.0}]


@pytest.mark.slow
@pytest.mark.parametrize("method", core(["update", "apply"], "apply"))
def test_integer_gradients_of_float_parameters_count_as_floats(method):
    tx, params = sg.guard(optax.adam(0.1)), {"w": jnp.ones(3)}
    state = tx.init(params)
    grads = {"w": jnp.array([3, -4, 12])}
    if method == "apply":
        new, state = sg.apply(tx, grads, state, params, value=1.0)
    else:
        updates, state = tx.update(grads, state, params, value=1.0)
        new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["w"], [0.9, 1.1, 0.9], rtol=1e-5)
    assert sg.metrics(state)["grad_norm"] == 13
    sg.metrics(tx.update(params, state, params, value=1.0)[1])


@pytest.mark.slow
def test_schedule_free_is_evaluated_on_the_guarded_inner_state():
    inner = optax.contrib.schedule_free_sgd(0.1)
    tx, params = sg.guard(inner, sg.skip()), PARAMS
    state, bare, other = tx.init(params), inner.init(params), params
    for _ in range(3):
        params, state = sg.apply(tx, params, state, params)
        other, bare = sg.apply(inner, other, bare, other)
    found, expected = (
        optax.contrib.schedule_free_eval_params(own, tree)["b"]
        for own, tree in ((state.guarded_inner, params), (bare, other))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found != PARAMS["b"]).all()


@pytest.mark.slow
def test_a_state_without_its_guards_is_that_of_the_optimizer_alone():
    params = {"w": jnp.ones(3)}
    clip, adam = optax.clip(1.0), optax.adam(0.1)
    inner = sg.guard(optax.chain(clip, sg.guard(adam)), sg.skip())
    guarded, bare = optax.chain(clip, inner), optax.chain(clip, optax.chain(clip, adam))
    state, expected = guarded.init(params), bare.init(params)
    for _ in range(2):
        _, state = guarded.update(params, state, params)
        _, expected = bare.update(params, expected, params)
    chex.assert_trees_all_close(sg.unwrap(state), expected, rtol=1e-6)
    chex.assert_trees_all_equal(sg.unwrap(expected), expected)
