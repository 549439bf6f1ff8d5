"""States that were reset, swapped or made by other settings, and odd metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg

UPDATES = {"w": jnp.ones(2)}


def test_a_metric_for_a_state_of_zeros_waits_for_the_next_update():
    tx = sg.reduce_on_plateau(0.5, 1, metric=None)
    state = optax.tree.zeros_like(tx.init(UPDATES))
    state = sg.observe_metric(state, value=1.0)
    updates, state = tx.update(UPDATES, state, UPDATES)
    np.testing.assert_array_equal(updates["w"], 1.0)
    state = sg.observe_metric(state, value=0.5)
    assert sg.metrics(state)["plateau_best"] == 0.5
    assert sg.metrics(state)["plateau_evaluations"] == 1


@pytest.mark.parametrize("other", [{"mode": "min"}, {"convention": "keras"}])
def test_a_state_of_another_rule_is_an_error(other):
    tx = sg.reduce_on_plateau(0.5, 2, mode="max")
    state = sg.reduce_on_plateau(0.5, 2, **{"mode": "max"} | other).init(UPDATES)
    with pytest.raises(ValueError, match="convention, mode and threshold_mode"):
        tx.update(UPDATES, state, UPDATES, value=1.0)


@pytest.mark.parametrize(
    "tx",
    [
        sg.reduce_on_plateau(),
        sg.scale_by_explosion_aware_schedule(1e-3, sg.fixed(5.0, of="value")),
    ],
)
def test_the_state_of_something_else_is_an_error(tx):
    with pytest.raises(ValueError, match="needs the state from its own `init`"):
        tx.update(UPDATES, (), UPDATES, value=1.0)


@pytest.mark.parametrize("value", [1e300, np.float64(1e300), np.array(1e300)])
def test_a_number_of_the_host_beyond_float32_is_finite(value):
    tx = sg.reduce_on_plateau()
    _, state = tx.update(UPDATES, tx.init(UPDATES), UPDATES, value=value)
    assert sg.metrics(state)["plateau_ignored_metrics"] == 0
    assert sg.metrics(state)["plateau_best"] > 1e38


@pytest.mark.parametrize("wrong", [jnp.ones(2), 1j])
def test_a_schedule_that_returns_no_real_number_is_an_error(wrong):
    limit = sg.fixed(5.0, of="value")
    tx = sg.scale_by_explosion_aware_schedule(lambda _: wrong, limit)
    with pytest.raises(ValueError, match="`schedule` must return one real number"):
        tx.update(UPDATES, tx.init(UPDATES), UPDATES, value=1.0)


def test_a_step_with_a_rate_that_is_not_finite_is_dropped_and_counted():
    schedule = lambda step: jnp.where(step == 1, jnp.nan, 0.5)
    tx = sg.scale_by_explosion_aware_schedule(schedule, sg.fixed(5.0, of="value"))

    def step(state, _):
        updates, state = tx.update(UPDATES, state, UPDATES, value=1.0)
        return state, updates["w"][0]

    state, taken = jax.lax.scan(step, tx.init(UPDATES), None, length=3)
    np.testing.assert_array_equal(taken, [0.5, 0.0, 0.5])
    assert sg.metrics(state)["schedule_dropped_steps"] == 1


@pytest.mark.slow
@pytest.mark.skipif(
    optax.__version__ < "0.2.8",
    reason="earlier versions of optax change the dtype of nu as well",
)
def test_bfloat16_parameters_scan_with_the_injection_that_is_advised():
    inject = optax.inject_hyperparams(
        optax.adamw, static_args=("mu_dtype",), hyperparam_dtype=jnp.float32
    )
    rate = sg.explosion_aware_schedule(1e-3, sg.fixed(5.0, of="value"))
    tx = inject(learning_rate=rate, mu_dtype=jnp.float32)
    params = {"w": jnp.ones(2, jnp.bfloat16)}

    def step(state, value):
        updates, state = tx.update(params, state, params, value=value)
        return state, updates["w"]

    _, updates = jax.lax.scan(step, tx.init(params), jnp.ones(3))
    assert np.isfinite(updates.astype(float)).all()
