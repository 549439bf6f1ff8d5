"""Tests for updates called without `jax.jit`: one compilation, no leak."""

import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core

import stablegrad as sg

PARAMS = {"w": jnp.ones((3, 2))}
COMPILATION = "/jax/core/compile/backend_compile_duration"
# Every compilation of this process: older JAX cannot take a listener away again.
_compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: event == COMPILATION and _compiled.append(duration)
)


class Compilations:
    """Counts the programs that are compiled inside of its block."""

    def __enter__(self):
        self.before = len(_compiled)
        return self

    def __exit__(self, *exception):
        del exception

    def __len__(self):
        return len(_compiled) - self.before


TRANSFORMATIONS = {
    "guard": lambda: sg.guard(optax.adam(0.1), sg.skip()),
    "stabilize": lambda: sg.stabilize(optax.adam(0.1)),
    "clip_by_norm": lambda: sg.clip_by_norm(1.0),
    "clip_by_zscore": lambda: sg.clip_by_zscore(),
}


@pytest.mark.slow
def test_an_update_is_a_function_whose_traces_can_be_counted():
    tx = sg.stabilize(optax.adam(0.1))
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(PARAMS)
    for value in (1.0, 2.0):
        _, state = update(PARAMS, state, PARAMS, value=value)


def test_an_unjitted_step_names_the_leaf_that_is_missing():
    tx = sg.guard(optax.sgd(0.1))
    state = tx.init({"w": jnp.ones(2), "bias": jnp.ones(2)})
    with pytest.raises(ValueError, match="missing: bias"):
        tx.update({"w": jnp.ones(2)}, state)


@pytest.mark.parametrize("name", core(TRANSFORMATIONS, "guard", "clip_by_norm"))
def test_an_unjitted_update_compiles_one_program(name):
    tx = optax.with_extra_args_support(TRANSFORMATIONS[name]())
    state = tx.init(PARAMS)
    with Compilations() as found:
        _, state = tx.update(PARAMS, state, PARAMS, value=1.0)
        assert len(found) == 1
        for value in (1.0, 2.0, 3.0):
            _, state = tx.update(PARAMS, state, PARAMS, value=value)
        assert len(found) == 1


@pytest.mark.slow
def test_an_unjitted_apply_compiles_one_program():
    tx, params = sg.guard(optax.adam(0.1)), PARAMS
    state = tx.init(params)
    with Compilations() as found:
        for value in (1.0, 2.0, 3.0):
            params, state = sg.apply(tx, PARAMS, state, params, value=value)
        assert len(found) == 1
    assert sg.metrics(state)["guarded_steps"] == 3


def scaled_by_value_fn():
    """An optimizer that multiplies the gradient by what `value_fn` returns."""

    def update(updates, state, params=None, *, value_fn, **extra):
        del extra
        return optax.tree.scale(value_fn(params), updates), state

    return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)


class Constant:
    """A loss that is the same everywhere."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, params):
        del params
        return self.loss


@pytest.mark.slow
@pytest.mark.parametrize("method", ["update", "apply"])
def test_a_new_value_fn_is_used_and_the_old_one_is_not_kept(method):
    tx = sg.guard(scaled_by_value_fn())
    state = tx.init(PARAMS)

    def moved(value_fn):
        if method == "update":
            return tx.update(PARAMS, state, PARAMS, value_fn=value_fn)[0]["w"]
        new, _ = sg.apply(tx, PARAMS, state, PARAMS, value_fn=value_fn)
        return new["w"] - PARAMS["w"]

    first = Constant(2.0)
    np.testing.assert_array_equal(moved(first), 2.0)
    kept = weakref.ref(first)
    del first
    np.testing.assert_array_equal(moved(Constant(3.0)), 3.0)
    gc.collect()
    assert kept() is None


@pytest.mark.slow
def test_one_value_fn_compiles_one_program():
    tx, value_fn = sg.guard(scaled_by_value_fn()), Constant(2.0)
    state = tx.init(PARAMS)
    with Compilations() as found:
        for _ in range(3):
            _, state = tx.update(PARAMS, state, PARAMS, value_fn=value_fn)
        assert len(found) == 1


@pytest.mark.slow
def test_an_unjitted_update_does_what_a_jitted_one_does():
    tx = sg.guard(optax.adam(0.1), sg.skip())
    grads = {"w": jnp.arange(6.0).reshape(3, 2)}
    plain, state = tx.update(grads, tx.init(PARAMS), PARAMS, value=1.0)
    jitted, other = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, value=1.0)
    np.testing.assert_array_equal(plain["w"], jitted["w"])
    assert sg.metrics(state) == sg.metrics(other)


@pytest.mark.slow
def test_a_leaf_whose_name_has_a_line_break_is_the_same_in_every_step():
    params = {"a\nb": jnp.ones(2)}
    tx = sg.guard(optax.sgd(0.1), sg.skip())
    state = tx.init(params)
    for _ in range(2):
        params, state = sg.apply(tx, params, state, params)
    assert sg.metrics(state)["guarded_steps"] == 2
    params, state = jax.jit(lambda p, s: sg.apply(tx, p, s, p))(params, state)
