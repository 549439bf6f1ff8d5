"""A whole Equinox model as `params`, functions and numbers included."""

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
