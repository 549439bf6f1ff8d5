"""Bad gradients and bad steps under a trust region."""

import itertools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import stablegrad as sg

STEPS = 40
CURVATURE = jnp.linspace(0.2, 4.0, 8)[None]
INNER = {
    "too long": optax.sgd(50.0),
    "adam": optax.adam(1.0),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
}


def bowl(params):
    return 0.5 * jnp.sum(CURVATURE * params["w"] ** 2) + jnp.sum(params["b"] ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("name, rows", list(itertools.product(INNER, (24, 8256))))
def test_steps_on_bad_gradients_are_rejected_and_the_others_go_down(name, rows):
    tx = sg.guard(
        INNER[name], sg.skip(sg.nonfinite(), sg.fixed(1e6)), sg.trust_region(every=2)
    )
    first, second = jax.random.split(jax.random.key(0))
    params = {
        "w": jax.random.normal(first, (rows, 8)),
        "b": jax.random.normal(second, (8,)),
    }

    @jax.jit
    def run(params, faults):
        def step(carry, fault):
            params, state = carry
            loss, grads = jax.value_and_grad(bowl)(params)
            grads = {**grads, "b": grads["b"].at[1].add(fault)}
            params, state = sg.apply(
                tx, grads, state, params, value=loss, value_fn=bowl
            )
            return (params, state), (loss, sg.metrics(state)["skipped"])

        return jax.lax.scan(step, (params, tx.init(params)), faults)

    bad_steps = [7, 8, 20]
    faults = (
        jnp.zeros(STEPS)
        .at[jnp.array(bad_steps)]
        .set(jnp.array([jnp.nan, 1e9, jnp.inf]))
    )
    (params, state), (losses, skipped) = run(params, faults)
    assert jnp.flatnonzero(skipped).tolist() == bad_steps
    assert sg.metrics(state)["trust_probes"] > 10
    assert losses[-1] < 0.05 * losses[0]
    chex.assert_tree_all_finite((params, state))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 1024])
def test_an_inf_in_one_element_of_every_step_does_not_stop_the_others(rows):
    # One divisor is zero, so the optimizer makes an inf out of a finite gradient.
    def init(params):
        return jax.tree.map(lambda x: jnp.ones_like(x).at[1, 1].set(0.0), params)

    def update(updates, divisors, params=None):
        del params
        return jax.tree.map(lambda g, d: -20.0 * g / d, updates, divisors), divisors

    inner = optax.GradientTransformation(init, update)
    tx = sg.guard(inner, sg.skip(), sg.trust_region(every=1))
    start = params = {"w": jnp.ones((rows, 128))}
    loss_fn = lambda params: 0.5 * jnp.sum(params["w"] ** 2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return sg.apply(tx, grads, state, params, value=loss, value_fn=loss_fn)

    state = tx.init(params)
    for t in range(8):
        before = params
        params, state = step(params, state)
        seen = sg.metrics(state)
        assert not seen["skipped"] and seen["kept_out_elements"] == 1
        assert seen["trust_probes"] > t and seen["trust_scale"] > 0
        assert params["w"][1, 1] == 1 and (params["w"] != before["w"]).sum() > 0
    assert loss_fn(params) < 0.1 * loss_fn(start)
    chex.assert_tree_all_finite((params, state))


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e20, 1e25, 1e37])
def test_a_step_whose_length_overflows_is_held_back(rate):
    tx = sg.guard(optax.sgd(rate), sg.trust_region())
    start = params = {"w": jnp.ones((3, 8)), "b": jnp.ones(8)}

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(bowl)(params)
        return sg.apply(tx, grads, state, params, value=loss, value_fn=bowl)

    state = tx.init(params)
    for _ in range(6):
        params, state = step(params, state)
    chex.assert_trees_all_equal(params, start)
    seen = sg.metrics(state)
    assert seen["lr_scale"] == 0 and seen["shortened_steps"] == 6
    assert [event.kind for event in sg.events(state)] == ["shorten"]
