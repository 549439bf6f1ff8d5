"""Guards beside Equinox and Orbax."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers.training import of_norm

import stablegrad as sg


@pytest.mark.slow
def test_equinox_models_train_and_their_leaves_are_named():
    model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))
    tx = sg.guard(optax.adam(0.05), sg.skip())
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, x):
        @eqx.filter_value_and_grad
        def loss_fn(model):
            return jnp.mean((jax.vmap(model)(x) - 1.0) ** 2)

        loss, grads = loss_fn(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params, value=loss)
        return eqx.apply_updates(model, updates), state, loss

    x = jax.random.normal(jax.random.key(1), (16, 3))
    model, state, first = step(model, state, x)
    for step_index in range(40):
        bad = jnp.nan if step_index == 7 else 1.0
        model, state, loss = step(model, state, x * bad)
    assert loss < 0.2 * first
    assert sg.metrics(state)["skipped_steps"] == 1
    assert sg.events(state)[0].leaf == "layers.0.weight"


@pytest.mark.slow
def test_orbax_resumes_in_the_middle_of_a_spike_as_if_never_stopped(tmp_path):
    tx = sg.stabilize(optax.adamw(0.1))
    step = jax.jit(lambda g, s, p: sg.apply(tx, g, s, p, value=jnp.linalg.norm(g["w"])))
    norms = [1.0] * 30 + [1e4] * 6 + [1.0, 1e4] + [1.0] * 10
    grads = of_norm(norms)["w"]
    params = {"w": jnp.array([1.0, 2.0])}
    state = tx.init(params)
    for index, grad in enumerate(grads):
        if index == 33:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "spike", (params, state))
        params, state = step({"w": grad}, state, params)

    fresh = {"w": jnp.zeros(2)}
    target = jax.eval_shape(lambda: (fresh, tx.init(fresh)))
    with ocp.StandardCheckpointer() as checkpointer:
        resumed, resumed_state = checkpointer.restore(tmp_path / "spike", target)
    for grad in grads[33:]:
        resumed, resumed_state = step({"w": grad}, resumed_state, resumed)
    chex.assert_trees_all_equal(resumed, params)
    chex.assert_trees_all_equal(resumed_state, state)
    assert np.asarray(sg.metrics(state)["skipped_steps"]) > 3
