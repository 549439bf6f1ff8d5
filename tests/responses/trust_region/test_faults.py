"""Bad gradients and bad steps under a trust region."""

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


@pytest.mark.parametrize("rows", [24, 8256])
@pytest.mark.parametrize("name", INNER)
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


def test_a_step_with_a_hidden_inf_teaches_the_trust_region_nothing():
    # One divisor is 1, 1/2 and then 0. What it falls by is in the state, as no range
    # of it is known beforehand with constants of that size.
    def init(params):
        ones = optax.tree.ones_like(params)
        return ones, jax.tree.map(lambda x: jnp.zeros_like(x).at[1, 1].set(0.5), ones)

    def update(updates, state, params=None):
        divisors, falls = state
        steps = jax.tree.map(lambda g, d: -0.1 * g / d, updates, divisors)
        return steps, (jax.tree.map(jnp.subtract, divisors, falls), falls)

    inner = optax.GradientTransformation(init, update)
    tx = sg.guard(inner, sg.skip(), sg.trust_region(every=1))
    params = {"w": jnp.ones((1024, 128))}
    loss_fn = lambda params: 0.5 * jnp.sum(params["w"] ** 2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return sg.apply(tx, grads, state, params, value=loss, value_fn=loss_fn)

    state, seen = tx.init(params), []
    for _ in range(3):
        params, state = step(params, state)
        seen.append(sg.metrics(state))
    assert [bool(now["skipped"]) for now in seen] == [False, False, True]
    for key in ("trust_radius", "trust_probes", "trust_cuts"):
        assert seen[2][key] == seen[1][key]
    chex.assert_tree_all_finite(params)
