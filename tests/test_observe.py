"""Tests for `metrics`, `events` and `is_healthy`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from helpers.training import of_norm, scan

import stablegrad as sg

PARAMS = {"dense": {"bias": jnp.zeros(2), "kernel": jnp.ones((2, 3))}}

DOCUMENTED = {
    "grad_norm",
    "clipped_grad_norm",
    "clip_scale",
    "loss_value",
    "lr_scale",
    "skipped",
    "skip_reason",
    "first_bad_leaf",
    "largest_leaf",
    "kept_out_elements",
    "kept_out_steps",
    "halted",
    "guarded_steps",
    "clipped_steps",
    "skipped_steps",
    "back_off_scale",
    "backed_off_steps",
    "shortened_steps",
    "trust_radius",
    "trust_ratio",
    "trust_scale",
    "trust_probes",
    "trust_cuts",
    "trust_target",
    "trust_mismatch",
    "halted_steps",
    "nonfinite_run",
    "consecutive_skips",
    "warned_steps",
}


@functools.cache
def guarded():
    return sg.guard(optax.sgd(0.1), sg.clip(sg.zscore(2.5)), sg.skip(), sg.halt(5))


@pytest.mark.slow
def test_every_metric_is_a_documented_scalar():
    tx = sg.stabilize(optax.adam(0.1))
    seen = jax.jit(sg.metrics)(tx.init(PARAMS))
    limits = {name for name in seen if name.endswith("_limit")}
    assert set(seen) - limits == DOCUMENTED
    for name in DOCUMENTED:
        assert f"`{name}`" in sg.metrics.__doc__
    assert limits == {
        "clip_rarity_grad_norm_limit",
        "skip_nonfinite_grad_norm_limit",
        "skip_nonfinite_value_limit",
        "skip_rarity_grad_norm_limit",
        "back_off_rarity_value_limit",
    }
    for number in seen.values():
        chex.assert_rank(number, 0)


def test_metrics_are_numpy_scalars_on_the_host_and_the_same_under_a_trace():
    state = sg.stabilize(optax.adam(0.1)).init(PARAMS)
    concrete, traced = sg.metrics(state), jax.jit(sg.metrics)(state)
    for number in concrete.values():
        assert isinstance(number, np.ndarray | np.generic)
    assert concrete.keys() == traced.keys()
    for name, number in concrete.items():
        np.testing.assert_array_equal(traced[name], number, err_msg=name)
        assert traced[name].dtype == number.dtype


@pytest.mark.slow
def test_the_norm_of_an_update_is_told_where_a_threshold_watches_it():
    tx = sg.guard(optax.sgd(0.1), sg.clip(sg.fixed(0.1, of="update_norm")))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    seen = sg.metrics(state)
    np.testing.assert_allclose(seen["raw_update_norm"], 0.1 * 6**0.5, rtol=1e-6)
    np.testing.assert_allclose(seen["update_norm"], 0.1, rtol=1e-6)
    for name in ("raw_update_norm", "update_norm"):
        assert name not in sg.metrics(guarded().init(PARAMS))
        assert f"`{name}`" in sg.metrics.__doc__


@pytest.mark.slow
def test_limits_of_like_thresholds_are_numbered():
    rules = [sg.clip(sg.fixed(limit)) for limit in (3.0, 2.0)]
    tx = sg.guard(optax.sgd(0.1), *rules)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    seen = sg.metrics(state)
    assert seen["clip_fixed_grad_norm_limit"] == 3.0
    assert seen["clip_fixed_grad_norm_limit_2"] == 2.0


@pytest.mark.slow
def test_names_stay_with_their_limits_when_the_state_has_been_through_jit():
    # Pytrees sort dicts by key, the responses are in the user's order.
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(9.0)), sg.clip(sg.fixed(2.0)))
    step = jax.jit(lambda state: tx.update(PARAMS, state, PARAMS)[1])
    seen = sg.metrics(step(step(tx.init(PARAMS))))
    assert seen["skip_fixed_grad_norm_limit"] == 9.0
    assert seen["clip_fixed_grad_norm_limit"] == 2.0


@pytest.mark.slow
def test_a_loss_that_was_not_passed_is_nan_and_a_lambda_is_called_signal():
    rule = sg.skip(sg.fixed(1.0, of=lambda updates, params, extra: jnp.float32(0.0)))
    tx = sg.guard(optax.sgd(0.1), rule)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    seen = sg.metrics(state)
    assert jnp.isnan(seen["loss_value"])
    assert seen["skip_fixed_signal_limit"] == 1.0


@pytest.mark.slow
def test_a_nan_is_reported_as_nan_while_the_state_stays_finite():
    tx = guarded()
    bad = {"dense": {"bias": jnp.zeros(2), "kernel": jnp.full((2, 3), jnp.nan)}}
    _, state = tx.update(bad, tx.init(PARAMS), PARAMS, value=jnp.inf)
    chex.assert_tree_all_finite(state)
    seen = sg.metrics(state)
    assert jnp.isnan(seen["grad_norm"])
    assert jnp.isinf(seen["loss_value"])
    assert jnp.isinf(seen["clip_zscore_grad_norm_limit"])
    assert seen["first_bad_leaf"] == 1
    assert seen["consecutive_skips"] == 1


NESTINGS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "masked": lambda tx: optax.masked(tx, {"dense": True}),
    "inject": lambda tx: optax.inject_hyperparams(lambda x: tx)(x=1.0),
    "multi steps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "if finite": lambda tx: optax.apply_if_finite(tx, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", core(NESTINGS, "chain", "inject"))
def test_finds_the_guard_inside_other_transformations(name):
    tx = NESTINGS[name](sg.guard(optax.sgd(0.1)))
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(sg.metrics(state)["grad_norm"], 6**0.5, rtol=1e-6)


@pytest.mark.slow
def test_several_guards_are_told_apart_outer_first():
    inner = sg.guard(optax.sgd(0.1), sg.clip(sg.fixed(1.0)))
    tx = sg.guard(inner, sg.clip(sg.fixed(2.0)))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    seen = sg.metrics(state)
    assert seen["guard_0_clip_fixed_grad_norm_limit"] == 2.0
    assert seen["guard_1_clip_fixed_grad_norm_limit"] == 1.0
    np.testing.assert_allclose(seen["guard_1_grad_norm"], 2.0, rtol=1e-6)


def test_fields_of_the_inner_state_can_be_got_by_name_by_optax():
    state = sg.stabilize(optax.adam(0.1)).init(PARAMS)
    for name in ("mu", "nu"):
        chex.assert_trees_all_equal_shapes(optax.tree.get(state, name), PARAMS)
    changed = optax.tree.set(state, count=jnp.int32(7))
    assert optax.tree.get(changed, "count") == 7


def test_reading_an_unguarded_state_is_an_error_that_says_what_to_pass():
    state = optax.adam(0.1).init(PARAMS)
    for read in (sg.metrics, sg.events, sg.is_healthy, sg.raise_if_halted):
        with pytest.raises(ValueError, match=r"no guard in this optimizer state"):
            read(state)


@pytest.mark.slow
def test_events_name_the_leaf_and_join_steps_in_a_row():
    tx = guarded()
    norms = np.ones(200)  # As many as of the test of the log.
    norms[[1, 2, 4]] = np.nan, np.nan, np.inf
    _, state, _ = scan(tx, of_norm(norms), {"w": jnp.zeros(2)}, np.arange(200.0))
    first, second = sg.events(state)
    assert (first.step, first.until, first.kind) == (1, 2, "skip")
    assert (second.step, second.until) == (4, 4)
    assert first.leaf == "w" and first.reason == "nonfinite_gradient"
    assert np.isnan(first.grad_norm) and first.loss == 1.0
    assert second.reason == "gradient_overflow" and np.isinf(second.grad_norm)
    assert first.member is None
    assert str(first).startswith("steps 1 to 2: skip (nonfinite gradient), leaf w, ")


@pytest.mark.slow
def test_events_tell_of_back_off_and_halt():
    tx = sg.guard(
        optax.sgd(0.1),
        sg.skip(),
        sg.back_off(sg.fixed(5.0, of="value")),
        sg.halt(after=2),
    )
    norms, values = [1, 1, np.nan, np.nan, np.nan, 1], [1, 9, 1, 1, 1, 1]
    _, state, _ = scan(tx, of_norm(norms), {"w": jnp.zeros(2)}, values)
    told = [(event.kind, event.step, event.until) for event in sg.events(state)]
    assert told == [("back_off", 1, 1), ("skip", 2, 2), ("halt", 3, 4)]


def test_the_log_keeps_the_last_64_events_in_order():
    norms = np.ones(200)
    norms[::2] = np.nan
    _, state, _ = scan(guarded(), of_norm(norms), {"w": jnp.zeros(2)})
    steps = [event.step for event in sg.events(state)]
    assert steps == list(range(72, 200, 2))


@pytest.mark.slow
def test_an_outlier_event_names_the_leaf_with_the_largest_norm():
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(5.0)))
    grads = {"dense": {"bias": jnp.full(2, 9.0), "kernel": jnp.ones((2, 3))}}
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert sg.events(state)[0].leaf == "dense.bias"
    assert sg.metrics(state)["first_bad_leaf"] == -1


@pytest.mark.slow
def test_health_is_finite_parameters_and_no_halt():
    tx = sg.guard(optax.sgd(0.1), sg.skip(), sg.halt(after=2))
    healthy = jax.jit(sg.is_healthy)
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    assert healthy(state, PARAMS) and not healthy(state, bad)
    _, state = tx.update(bad, state, PARAMS)
    assert healthy(state)  # One skipped step is healthy,
    _, state = tx.update(bad, state, PARAMS)
    assert not healthy(state)  # a halted run is not.


@pytest.mark.slow
def test_consecutive_skips_start_again_once_a_step_is_taken():
    tx = sg.guard(optax.sgd(0.1), sg.skip())
    norms = [np.nan, np.nan, 1.0, np.nan]
    _, _, (_, seen, _) = scan(tx, of_norm(norms), {"w": jnp.zeros(2)})
    np.testing.assert_array_equal(seen["consecutive_skips"], [1, 2, 0, 1])


@pytest.mark.slow
def test_a_skipped_step_does_not_count_as_clipped():
    tx = sg.guard(optax.sgd(0.1), sg.clip(sg.fixed(1.0)), sg.skip(sg.fixed(2.0)))
    _, state, _ = scan(tx, of_norm([5.0]), {"w": jnp.zeros(2)})
    seen = sg.metrics(state)
    assert seen["clipped_steps"] == 0 and seen["skipped_steps"] == 1


@pytest.mark.slow
def test_skips_for_different_reasons_are_different_events():
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.nonfinite(), sg.fixed(1.0)))
    _, state, _ = scan(tx, of_norm([np.nan, 5.0]), {"w": jnp.zeros(2)})
    reasons = [event.reason for event in sg.events(state)]
    assert reasons == ["nonfinite_gradient", "gradient_norm"]


@pytest.mark.slow
def test_the_limit_of_the_strictest_leaf_is_reported():
    tx = sg.guard(optax.sgd(0.0), sg.clip(sg.zscore(2.5, per="leaf", warmup_steps=3)))
    params = {"a": jnp.array([1.0]), "b": jnp.array([100.0])}
    grads = {name: jnp.tile(leaf, (4, 1)) for name, leaf in params.items()}
    _, state, _ = scan(tx, grads, params)
    assert 1 < sg.metrics(state)["clip_zscore_grad_norm_limit"] < 2


def test_an_overflow_is_told_from_a_nan():
    tx = sg.guard(optax.sgd(0.1))
    norms = [0.9e18, 1.1e18, np.inf, np.nan]
    _, state, (_, seen, _) = scan(tx, of_norm(norms), {"w": jnp.zeros(2)})
    codes = [0, sg.Reason.GRADIENT_OVERFLOW, sg.Reason.GRADIENT_OVERFLOW]
    codes += [sg.Reason.NONFINITE_GRADIENT]
    np.testing.assert_array_equal(seen["skip_reason"], codes)
    np.testing.assert_allclose(seen["grad_norm"], norms, rtol=1e-6)
    np.testing.assert_array_equal(seen["first_bad_leaf"], [-1, 0, 0, 0])
    told = [(e.step, e.until, e.reason) for e in sg.events(state)]
    assert told == [(1, 2, "gradient_overflow"), (3, 3, "nonfinite_gradient")]
    assert str(sg.events(state)[0]).startswith(
        "steps 1 to 2: skip (gradient overflow), leaf w, gradient norm 1.1e+18"
    )


def square_root():
    """An optimizer whose update is nan where the gradient is negative."""
    return optax.stateless(lambda grads, params: jax.tree.map(jnp.sqrt, grads))


@pytest.mark.slow
def test_an_element_that_was_kept_out_is_counted_and_its_leaf_named():
    tx = sg.guard(square_root())
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    bad = {"dense": grads["dense"] | {"kernel": grads["dense"]["kernel"].at[1].set(-1)}}
    state = tx.init(PARAMS)
    _, state = tx.update(bad, state, PARAMS)
    seen = sg.metrics(state)
    assert seen["kept_out_elements"] == 3 and seen["kept_out_steps"] == 1
    assert seen["first_bad_leaf"] == 1 and not seen["skipped"]
    _, state = tx.update(grads, state, PARAMS)
    seen = sg.metrics(state)
    assert seen["kept_out_elements"] == 0 and seen["kept_out_steps"] == 1
    (event,) = sg.events(state)
    assert (event.kind, event.step, event.until) == ("keep_out", 0, 0)
    assert event.leaf == "dense.kernel" and event.reason == ""
    assert str(event).startswith("step 0: keep out, leaf dense.kernel")


HALTING = sg.guard(optax.sgd(0.1), sg.skip(), sg.halt(after=2))
start_all, step_all = (jax.jit(jax.vmap(f)) for f in (HALTING.init, HALTING.update))


def ensemble(norms):
    """The state of models that are trained together, a column of norms each."""
    norms = jnp.asarray(norms, jnp.float32)
    params = {"w": jnp.zeros((norms.shape[1], 1))}
    state = start_all(params)
    for row in norms:
        _, state = step_all({"w": row[:, None]}, state, params)
    return params, state


@pytest.mark.slow
def test_events_of_an_ensemble_say_which_member():
    _, state = ensemble([[1.0, np.nan, 1.0], [np.inf, 1.0, 1.0]])
    told = [(e.member, e.step, e.reason) for e in sg.events(state)]
    assert told == [(0, 1, "gradient_overflow"), (1, 0, "nonfinite_gradient")]
    assert str(sg.events(state)[1]).startswith("member 1, step 0: skip")
    assert {event.leaf for event in sg.events(state)} == {"w"}


def test_health_of_an_ensemble_is_told_by_member():
    params, state = ensemble([[1.0, np.nan, 1.0], [1.0, np.nan, np.nan]])
    healthy = jax.jit(sg.is_healthy)(state, params)
    np.testing.assert_array_equal(healthy, [True, False, True])
    bad = {"w": params["w"].at[2].set(jnp.nan)}
    np.testing.assert_array_equal(sg.is_healthy(state, bad), [True, False, False])
    with pytest.raises(sg.TrainingHalted, match=r"members \[1\]"):
        sg.raise_if_halted(state)


def test_what_members_share_is_healthy_for_all_or_none_and_cannot_be_kept_for_one():
    params, state = ensemble([[1.0, 1.0, 1.0], [1.0, np.nan, 1.0]])
    for shape in ((), (5,), (5, 3)):
        shared = jnp.ones(shape)
        assert sg.is_healthy(state, params, shared).tolist() == [True] * 3
        assert sg.is_healthy(state, params, shared / 0).tolist() == [False] * 3
        with pytest.raises(ValueError, match=r"members of the ensemble, \(3,\)"):
            sg.keep_if_skipped(state, shared, shared + 1)


@pytest.mark.parametrize("name", ["raise_if_halted", "events", "scalars"])
def test_a_reader_of_the_host_says_so_inside_jit(name):
    with pytest.raises(TypeError, match=f"`{name}` reads numbers on the host"):
        jax.jit(getattr(sg, name))(guarded().init(PARAMS))
