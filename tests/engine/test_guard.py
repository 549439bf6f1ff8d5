"""Tests for `stablegrad.guard`: what no single step can do."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from helpers.training import of_norm, scan

import stablegrad as sg

PARAMS = {"w": jnp.array([1.0, 2.0])}


def emitting(updates_at, state_at):
    """An optimizer that turns step t's gradient into whatever the tables say."""

    class Emitted(NamedTuple):
        step: jax.Array
        memory: jax.Array

    def init(params):
        del params
        return Emitted(jnp.zeros((), jnp.int32), jnp.zeros(()))

    def update(updates, state, params=None):
        del params
        factor = jnp.asarray(updates_at)[state.step]
        memory = jnp.asarray(state_at)[state.step]
        updates = jax.tree.map(lambda x: factor * x, updates)
        return updates, Emitted(state.step + 1, memory)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("bad", core([jnp.nan, jnp.inf], jnp.nan))
def test_an_update_that_is_not_finite_is_rejected_without_being_asked(bad):
    # Rule 8. The gradient is fine; the optimizer is not.
    tx = sg.guard(emitting([1.0, bad, 1.0], [0.0, 0.0, 0.0]))
    _, _, (params, seen, _) = scan(tx, of_norm(np.ones(3)), PARAMS)
    np.testing.assert_array_equal(seen["skip_reason"], [0, 3, 0])
    assert seen["skip_reason"][1] == sg.Reason.NONFINITE_UPDATE
    assert seen["first_bad_leaf"][1] == 0
    np.testing.assert_array_equal(params["w"][1], params["w"][0])


@pytest.mark.parametrize("bad", core([jnp.nan, jnp.inf], jnp.nan))
def test_what_breaks_in_the_state_is_kept_out_and_the_step_is_taken(bad):
    tx = sg.guard(emitting([1.0, 1.0, 1.0], [0.5, bad, 0.0]))
    _, state, (params, seen, inner) = scan(tx, of_norm(np.ones(3)), PARAMS)
    np.testing.assert_array_equal(seen["kept_out_elements"], [0, 1, 0])
    assert not seen["skipped"].any()
    assert (params["w"][1] != params["w"][0]).all()
    np.testing.assert_array_equal(inner.memory, [0.5, 0.5, 0.0])
    np.testing.assert_array_equal(inner.step, [1, 2, 3])
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize(
    "dtype, start, rate, method",
    [
        ("float16", 6e4, 1e5, "update"),
        pytest.param("float32", 3e38, 3e38, "apply", marks=pytest.mark.slow),
        pytest.param("float16", 6e4, 1e5, "apply", marks=pytest.mark.slow),
        pytest.param("bfloat16", 3e38, 1e38, "update", marks=pytest.mark.slow),
        pytest.param("bfloat16", 3e38, 1e38, "apply", marks=pytest.mark.slow),
    ],
)
def test_elements_that_would_overflow_parameters_are_kept(dtype, start, rate, method):
    tx = sg.guard(optax.sgd(rate), sg.skip())
    params = {"w": jnp.array([start, 1.0], dtype)}
    grads = {"w": jnp.array([-1.0, 1e-4], jnp.float32)}

    def step(grads, state, params):
        if method == "apply":
            return sg.apply(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new, state = jax.jit(step)(grads, tx.init(params), params)
    assert new["w"][0] == params["w"][0] and jnp.isfinite(new["w"]).all()
    assert new["w"][1] != params["w"][1]
    assert sg.metrics(state)["kept_out_elements"] == 1
    assert not sg.metrics(state)["skipped"]


@pytest.mark.slow
def test_training_goes_on_between_the_updates_of_multi_steps():
    # The guard sees updates of exactly zero on seven steps of eight.
    inner = optax.MultiSteps(optax.sgd(0.1), 8).gradient_transformation()
    tx = sg.stabilize(inner)
    params, state = {"w": jnp.array([1.0, 2.0])}, None
    state = tx.init(params)

    @jax.jit
    def step(carry, _):
        params, state = carry
        return sg.apply(tx, params, state, params, value=1.0), None

    (params, state), _ = jax.lax.scan(step, (params, state), length=1600)
    assert np.abs(params["w"]).max() < 1e-6
    assert sg.metrics(state)["skipped_steps"] == 0


@pytest.mark.slow
def test_a_state_that_holds_infinity_on_purpose_is_left_alone():
    inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    tx = sg.guard(inner, sg.skip())
    state = tx.init(PARAMS)
    assert jnp.isinf(optax.tree.get(state, "best_value"))
    assert sg.is_healthy(state, PARAMS)
    _, state = tx.update(PARAMS, state, PARAMS, value=jnp.asarray(1.0))
    assert not sg.metrics(state)["skipped"]


@pytest.mark.slow
def test_float16_adam_on_zero_gradients_never_emits_a_nan():
    # 1e-8 is zero in float16, so Adam divides zero by zero.
    params = {"w": jnp.ones((3,), jnp.float16)}
    tx = sg.guard(optax.adam(1e-3), sg.skip())
    updates, state = jax.jit(tx.update)(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    chex.assert_tree_all_finite((updates, state))
    assert sg.metrics(state)["skip_reason"] == sg.Reason.NONFINITE_UPDATE


@pytest.mark.slow
@pytest.mark.parametrize(
    "responses",
    [(), pytest.param((sg.skip(),), marks=pytest.mark.slow)],
    ids=["bare", "skip"],
)
def test_a_finite_gradient_of_1e20_does_not_freeze_adam(responses):
    # Unguarded, its square makes the second moment inf, for ever.
    norms = [1.0, 1e20, 1.0, 1.0]
    tx = sg.guard(optax.adam(0.1), *responses)
    _, state, (params, seen, _) = scan(tx, of_norm(norms), PARAMS)
    np.testing.assert_array_equal(seen["skip_reason"], [0, 7, 0, 0])
    assert seen["skip_reason"][1] == sg.Reason.GRADIENT_OVERFLOW
    assert np.isinf(seen["grad_norm"][1])
    chex.assert_tree_all_finite(state)
    assert (params["w"][3] != params["w"][2]).all()


@pytest.mark.parametrize(
    "norm, size", core([(0.9e18, 2.0), (1.1e18, 0.0)], (0.9e18, 2.0))
)
def test_a_gradient_is_clipped_to_the_right_size_up_to_1e18(norm, size):
    tx = sg.guard(optax.sgd(1.0), sg.clip(sg.fixed(2.0)))
    updates, state = jax.jit(tx.update)(of_norm([norm]), tx.init(of_norm([0.0])), None)
    np.testing.assert_allclose(jnp.linalg.norm(updates["w"]), size, rtol=1e-6)
    assert sg.metrics(state)["skipped"] == (size == 0)


@pytest.mark.slow
def test_statistics_learn_on_rejected_steps_too():
    # A lasting shift above the skip threshold must become normal while skipped.
    norms = np.concatenate([np.ones(40), np.full(100, 1e3)])
    rule = sg.skip(sg.zscore(6.0, patience=30), max_consecutive=90)
    _, _, (_, seen, _) = scan(sg.guard(optax.sgd(1e-9), rule), of_norm(norms), PARAMS)
    assert seen["skipped"][40:70].all()
    assert not seen["skipped"][85:].any()


@pytest.mark.slow
def test_responses_share_a_step_and_each_does_its_part():
    tx = sg.guard(
        optax.sgd(1.0),
        sg.clip(sg.fixed(1.0)),
        sg.back_off(sg.fixed(5.0, of="value"), factor=0.25),
        sg.skip(sg.fixed(100.0)),
    )
    norms, values = [1.0, 10.0, 1000.0], [1.0, 9.0, 1.0]
    _, _, (params, seen, _) = scan(tx, of_norm(norms), PARAMS, values)
    np.testing.assert_allclose(seen["clipped_grad_norm"][:2], 1.0, rtol=1e-6)
    before = np.concatenate([[PARAMS["w"]], params["w"][:-1]])
    moved = np.linalg.norm(params["w"] - before, axis=1)
    np.testing.assert_allclose(moved, [1.0, 0.25, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(seen["skipped"], [False, False, True])


def test_extra_arguments_reach_the_inner_transformation():
    heard = {}

    def update(updates, state, params=None, **extra):
        heard.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = sg.guard(inner)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.asarray(1.0), flavour="sour")
    assert set(heard) == {"value", "flavour"}


@pytest.mark.slow
def test_each_member_of_an_ensemble_is_guarded_on_its_own():
    tx = sg.guard(optax.adam(0.1), sg.skip())
    params = {"w": jnp.ones((3, 2))}
    grads = {"w": jnp.ones((3, 2)).at[1].set(jnp.nan)}
    state = jax.jit(jax.vmap(tx.init))(params)
    updates, state = jax.jit(jax.vmap(tx.update))(grads, state, params)
    np.testing.assert_array_equal(sg.metrics(state)["skipped"], [False, True, False])
    np.testing.assert_array_equal(updates["w"][1], 0.0)
    np.testing.assert_allclose(updates["w"][0], -0.1, rtol=1e-5)
    healthy = jax.jit(sg.is_healthy)(state, params)
    np.testing.assert_array_equal(healthy, [True] * 3)
    (event,) = sg.events(state)
    assert (event.member, event.step, event.reason) == (1, 0, "nonfinite_gradient")
    assert str(event).startswith("member 1, step 0: skip (nonfinite gradient), leaf w")


@pytest.mark.slow
def test_hyperparameters_may_be_injected():
    @optax.inject_hyperparams
    def make(limit, max_consecutive, factor, after):
        return sg.guard(
            optax.sgd(1.0),
            sg.clip(sg.fixed(limit)),
            sg.skip(sg.nonfinite(), max_consecutive=max_consecutive),
            sg.back_off(sg.nonfinite(), factor=factor, min_scale=factor / 100),
            sg.halt(after=after),
        )

    tx = make(limit=2.0, max_consecutive=3, factor=0.5, after=4)
    state = tx.init(PARAMS)
    state.hyperparams["limit"] = jnp.asarray(0.5)
    grads = {"w": jnp.array([4.0, 0.0])}
    updates, state = jax.jit(tx.update)(grads, state, PARAMS)
    np.testing.assert_allclose(updates["w"], [-0.5, 0.0], rtol=1e-6)
    assert sg.metrics(state)["clip_fixed_grad_norm_limit"] == 0.5


@pytest.mark.parametrize("method", core(["update", "apply"], "apply"))
def test_one_trace_serves_a_whole_run(method):
    # Rule 11: healthy, clipped, skipped and halted steps are one program.
    tx = sg.stabilize(optax.adamw(0.1))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, grads, value):
        if method == "apply":
            return sg.apply(tx, grads, state, params, value=value)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for norm in [1.0] * 30 + [1e3, jnp.nan, 1e20, jnp.inf] + [jnp.nan] * 25 + [1.0]:
        grads = {"w": of_norm([norm])["w"][0]}
        params, state = step(params, state, grads, jnp.asarray(norm))
    now = sg.metrics(state)
    assert now["guarded_steps"] == 60
    assert (now["halted_steps"] > 0) and not now["skipped"]


@pytest.mark.slow
def test_the_compiled_step_never_calls_the_host_and_its_state_can_be_donated():
    # Rule 12; and every number needs a buffer of its own.
    tx = sg.stabilize(optax.adamw(0.1))
    step = jax.jit(
        lambda params, state: sg.apply(tx, params, state, params, value=1.0),
        donate_argnums=(0, 1),
    )
    params = {"w": jnp.array([1.0, 2.0])}
    state = tx.init(params)
    program = step.lower(params, state).compile()
    for word in ("callback", "infeed", "outfeed", "send(", "recv("):
        assert word not in program.as_text()
    for _ in range(2):
        params, state = program(params, state)
    assert sg.metrics(state)["guarded_steps"] == 2


@pytest.mark.slow
def test_a_held_step_teaches_nothing_about_an_update_that_was_never_made():
    tx = sg.guard(
        optax.identity(), sg.clip(sg.zscore(2.5, of="update_norm")), sg.skip()
    )
    clean = [1.0, 2.0, 1.5, 1.2, 30.0, 1.0, 1.0, 1.0]  # Of the same length.
    held = [1.0, 2.0, jnp.nan, 1.5, jnp.inf, 1.2, jnp.nan, 30.0]
    limit = "clip_zscore_update_norm_limit"
    expected, found = (
        np.asarray(scan(tx, of_norm(norms), PARAMS)[2][1][limit])
        for norms in ([1.0, *[1.5, 2.0] * 20, *clean], [1.0, *[1.5, 2.0] * 20, *held])
    )
    assert np.isfinite(expected[-4])
    np.testing.assert_array_equal(found[-1], expected[-4])
