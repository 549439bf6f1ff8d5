"""A whole Equinox model as `params`, functions and numbers included."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg

TRANSFORMATIONS = {
    "clip_by_zscore": lambda: optax.chain(sg.clip_by_zscore(2.5), optax.adam(1e-3)),
    "stabilize": lambda: sg.stabilize(optax.adam(1e-3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_an_update_takes_the_whole_model(name):
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 2))

    @eqx.filter_value_and_grad
    def loss_fn(model):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    loss, grads = loss_fn(model)
    tx = optax.with_extra_args_support(TRANSFORMATIONS[name]())
    arrays = eqx.filter(model, eqx.is_inexact_array)
    whole, _ = tx.update(grads, tx.init(arrays), model, value=loss)
    alone, _ = tx.update(grads, tx.init(arrays), arrays, value=loss)
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(alone), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
    moved = eqx.apply_updates(model, whole)
    assert (moved.layers[0].weight != model.layers[0].weight).any()
    assert moved.activation is model.activation


class Frozen(eqx.Module):
    """A trained weight, and what no gradient is taken of."""

    weight: jax.Array
    mask: jax.Array
    activation: Callable
    inference: bool
    scale: float

    def __call__(self, x):
        return self.activation(x @ self.weight) * self.mask * self.scale


MODEL = Frozen(jnp.ones((2, 1)), jnp.array([[3]]), jax.nn.tanh, False, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_a_probe_calls_the_loss_with_the_whole_model(compiled):
    tx = sg.stabilize(optax.sgd(100.0))
    loss_fn = lambda model: jnp.mean((model(jnp.ones((4, 2))) - 0.2) ** 2)

    def step(model, state):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
        return sg.apply(tx, grads, state, model, value=loss, value_fn=loss_fn)

    step = eqx.filter_jit(step) if compiled else step
    model, state = step(MODEL, tx.init(eqx.filter(MODEL, eqx.is_inexact_array)))
    assert sg.metrics(state)["trust_cuts"] == 1
    assert loss_fn(model) < loss_fn(MODEL)


@pytest.mark.parametrize("guarded", [pytest.param(True, marks=pytest.mark.slow), False])
def test_apply_leaves_what_has_no_gradient_as_it_was(guarded):
    tx = optax.adam(0.1)
    tx = sg.stabilize(tx) if guarded else tx
    arrays = eqx.filter(MODEL, eqx.is_inexact_array)

    @eqx.filter_jit
    def step(model, state, x):
        loss_fn = eqx.filter_value_and_grad(lambda model: jnp.mean(model(x) ** 2))
        loss, grads = loss_fn(model)
        return sg.apply(tx, grads, state, model, value=loss)

    moved, state = step(MODEL, tx.init(arrays), jnp.ones((4, 2)))
    assert (moved.weight != MODEL.weight).all()
    assert moved.mask == MODEL.mask
    assert moved.activation is MODEL.activation
    rest = moved.inference, moved.scale
    assert rest == (False, 0.5) and all(type(x) in (bool, float) for x in rest)
    grads = eqx.filter(moved, eqx.is_inexact_array)
    again, _ = sg.apply(tx, grads, state, moved, value=1.0)  # Without jit.
    assert again.activation is MODEL.activation and again.mask == MODEL.mask


def test_a_whole_model_is_healthy_and_kept_where_it_broke():
    tx = sg.guard(optax.sgd(0.1))
    state = tx.init(eqx.filter(MODEL, eqx.is_inexact_array))
    broken = eqx.tree_at(lambda m: m.weight, MODEL, jnp.array([[2.0], [jnp.inf]]))
    assert sg.is_healthy(state, MODEL) and not sg.is_healthy(state, broken)
    kept = sg.keep_if_skipped(state, MODEL, broken)
    assert kept.weight.tolist() == [[2.0], [1.0]]
    assert kept.activation is MODEL.activation and kept.inference is False


@pytest.mark.slow
def test_a_probe_of_an_update_calls_the_loss_with_the_whole_model():
    tx = sg.stabilize(optax.sgd(100.0))
    loss_fn = lambda model: jnp.mean((model(jnp.ones((4, 2))) - 0.2) ** 2)
    loss, grads = eqx.filter_value_and_grad(loss_fn)(MODEL)
    state = tx.init(eqx.filter(MODEL, eqx.is_inexact_array))
    updates, state = tx.update(grads, state, MODEL, value=loss, value_fn=loss_fn)
    assert sg.metrics(state)["trust_cuts"] == 1
    assert loss_fn(eqx.apply_updates(MODEL, updates)) < loss
