"""Tests for the two explosion-aware schedules, and for what they share."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.marking import core
from helpers.training import of_norm, scan
from hypothesis import given, settings, strategies as st

import stablegrad as sg

RTOL = 1e-5  # float32 products and powers over a hundred steps.
PARAMS = {"w": jnp.zeros(2)}
LIMIT = 5.0
STEPS = 50
# What may happen in a step: (gradient norm, loss).
EVENTS = {
    "calm": (1.0, 1.0),
    "explosion": (1.0, 9.0),
    "bad loss": (1.0, np.nan),
    "bad gradient": (np.nan, 1.0),
}


def base(position):
    """Falls, so that each rate tells its position."""
    return 0.5 / (1.0 + 0.1 * position)


def oracle(events, advance, factor, confirm_steps, hold_steps, regrow_steps, min_scale):
    """The documented recurrence in float64: factor and rate of every step."""
    # All explosions here are of one size, so only calm arms the next cut.
    k, left, run, to_blame, position = 1.0, 0, 0, False, 0
    factors, rates = [], []
    for event in events:
        if event == "explosion":
            run += 1
        elif event != "bad loss":
            run = 0
        explodes = event == "explosion" and run >= confirm_steps
        if explodes and to_blame and left == 0:
            k, to_blame = max(k * factor, min_scale), False
        if explodes:
            left = hold_steps
        factors.append(k)
        rates.append(k * 0.5 / (1 + 0.1 * position))
        if event == "calm" and left == 0:
            k = min(1.0, k * factor ** (-1 / regrow_steps))
        elif event == "calm":
            left -= 1
        position += advance == "always" or event == "calm"
        to_blame = to_blame or event != "bad gradient"
    return np.array(factors), np.array(rates)


def of_chain(schedule, *rules, **options):
    return sg.scale_by_explosion_aware_schedule(schedule, *rules, **options)


def of_injection(schedule, *rules, **options):
    rate = sg.explosion_aware_schedule(schedule, *rules, **options)
    return optax.inject_hyperparams(optax.scale)(step_size=rate)


DOORS = {"chain": of_chain, "schedule": of_injection}
every_door = pytest.mark.parametrize("door", DOORS)


def rates(tx, norms, values):
    """What multiplies the update of every step, the metrics, and the final state."""

    def step(state, xs):
        grads, value = xs
        updates, state = tx.update(grads, state, PARAMS, value=value)
        return state, (updates["w"][0] / grads["w"][0], sg.metrics(state))

    xs = (of_norm(norms), jnp.asarray(values, jnp.float32))
    state, (seen, told) = jax.lax.scan(step, tx.init(PARAMS), xs)
    return seen, told, state


@functools.cache
def compiled(door, advance):
    """One program for all numerical settings and all events."""

    def run(options, norms, values):
        rule = sg.fixed(LIMIT, of="value")
        tx = DOORS[door](base, rule, advance=advance, **options)
        return rates(tx, norms, values)

    return jax.jit(run)


OPTIONS = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([0.5, 0.3]),
        "confirm_steps": st.integers(1, 3),
        "hold_steps": st.integers(0, 4),
        "regrow_steps": st.integers(1, 12),
        "min_scale": st.sampled_from([1e-4, 0.2]),
    }
)


@pytest.mark.parametrize("advance", core(["always", "calm"], "calm"))
@pytest.mark.parametrize("door", core(DOORS, "chain"))
def test_matches_the_float64_oracle_and_stays_within_its_bounds(door, advance):
    run = compiled(door, advance)
    possible = list(EVENTS) if door == "chain" else list(EVENTS)[:3]
    likely = st.sampled_from(["calm"] * 6 + possible)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(OPTIONS, st.lists(likely, min_size=STEPS, max_size=STEPS))
    def check(options, events):
        norms, values = np.array([EVENTS[event] for event in events]).T
        seen, told, state = run(options, norms, values)
        factors, expected = oracle(events, advance, **options)
        np.testing.assert_allclose(told["schedule_lr_scale"], factors, rtol=RTOL)
        np.testing.assert_allclose(told["schedule_rate"], expected, rtol=RTOL)
        fine = np.array(events) != "bad gradient"
        np.testing.assert_allclose(seen[fine], expected[fine], rtol=RTOL)
        scale = np.asarray(told["schedule_lr_scale"])
        assert (scale <= 1).all() and (scale >= np.float32(options["min_scale"])).all()
        cuts = np.diff(scale, prepend=1.0) < 0
        assert told["schedule_cuts"][-1] == cuts.sum()
        assert told["schedule_dropped_steps"][-1] == (~fine).sum()
        chex.assert_tree_all_finite(state)

    check()


@every_door
def test_the_rate_of_the_base_schedule_is_regained_on_healthy_input(door):
    values = np.ones(100)
    values[1:7] = LIMIT + 3.0 ** np.arange(1, 7)  # Each rises further than the last.
    options = {"factor": 0.5, "hold_steps": 10, "regrow_steps": 12}
    tx = DOORS[door](0.3, sg.fixed(LIMIT, of="value"), **options)
    seen, told, _ = jax.jit(lambda: rates(tx, np.ones(100), values))()
    assert told["schedule_cuts"][-1] == 6
    np.testing.assert_allclose(seen[6], 0.3 / 64, rtol=RTOL)
    # Ten steps are held, and each cut is undone in twelve.
    assert seen[6 + 11 + 70] < 0.3
    np.testing.assert_array_equal(seen[6 + 11 + 73 :], np.float32(0.3))


SCHEDULES = {
    "number": 0.1,
    "integer": 2,
    "array": jnp.float32(0.1),
    "cosine": optax.warmup_cosine_decay_schedule(0.0, 0.3, 5, 15),
    "piecewise": optax.piecewise_constant_schedule(0.1, {5: 0.5, 10: 0.5}),
    "constant": optax.constant_schedule(0.1),
    "function": lambda step: 0.1 / (1 + step),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "door, name",
    core(
        [("schedule", "cosine"), *[("chain", name) for name in SCHEDULES]],
        ("schedule", "cosine"),
        ("chain", "piecewise"),
    ),
)
def test_any_base_schedule_is_followed_while_nothing_explodes(door, name):
    schedule = SCHEDULES[name]
    function = schedule if callable(schedule) else lambda step: schedule
    tx = DOORS[door](schedule, sg.fixed(LIMIT, of="value"))
    seen, _, _ = jax.jit(lambda: rates(tx, np.ones(16), np.ones(16)))()
    theirs = [function(jnp.int32(step)) for step in range(16)]
    np.testing.assert_allclose(seen, theirs, rtol=RTOL)


@pytest.mark.slow
def test_one_machine_is_behind_all_three_doors():
    values = np.where(np.random.default_rng(3).random(STEPS) < 0.4, 9.0, 1.0)
    options = {"factor": 0.4, "confirm_steps": 2, "hold_steps": 2, "regrow_steps": 5}
    rule = sg.fixed(LIMIT, of="value")
    guarded = sg.guard(optax.sgd(1.0), sg.back_off(rule, **options))
    _, _, (_, told, _) = scan(guarded, of_norm(np.ones(STEPS)), PARAMS, values)
    assert len(np.unique(told["lr_scale"])) > 4
    for door in DOORS.values():
        tx = door(1.0, rule, **options)
        _, seen, _ = jax.jit(lambda tx=tx: rates(tx, np.ones(STEPS), values))()
        np.testing.assert_array_equal(seen["schedule_lr_scale"], told["lr_scale"])


@pytest.mark.parametrize("flip_sign", [False, True])
def test_the_sign_is_that_of_optax(flip_sign):
    tx = sg.scale_by_explosion_aware_schedule(
        0.1, sg.fixed(LIMIT, of="value"), flip_sign=flip_sign
    )
    theirs = optax.scale_by_schedule(lambda step: 0.1)
    if flip_sign:
        theirs = optax.scale_by_learning_rate(0.1)
    grads = {"w": jnp.array([1.0, -2.0])}
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), value=1.0)
    expected, _ = theirs.update(grads, theirs.init(grads))
    chex.assert_trees_all_close(updates, expected)


def test_a_chain_watches_the_norm_of_the_updates_that_reach_it():
    # Raw norms of 1 and 8 reach it as 0.5 and 4.
    rule = sg.scale_by_explosion_aware_schedule(0.1, sg.fixed(3.0), factor=0.5)
    tx = optax.chain(optax.scale(0.5), rule, optax.scale(100.0))
    seen, _, _ = jax.jit(lambda: rates(tx, [1.0, 8.0, 1.0], np.ones(3)))()
    np.testing.assert_allclose(seen, [5.0, 2.5, 2.5], rtol=RTOL)


def test_a_chain_watches_leaves_and_functions():
    rule = sg.fixed(3.0, per="leaf")
    largest = sg.fixed(2.0, of=lambda updates, params, extra: jnp.max(updates["b"]))
    tx = sg.scale_by_explosion_aware_schedule(1.0, rule, largest)
    calm = {"a": jnp.array([2.9, 0.0]), "b": jnp.array([1.9, 1.9])}
    state = tx.init(calm)
    step = jax.jit(tx.update)
    _, state = step(calm, state)
    assert sg.metrics(state)["schedule_cuts"] == 0
    _, state = step({**calm, "a": jnp.array([3.1, 0.0])}, state)
    assert sg.metrics(state)["schedule_cuts"] == 1
    _, state = step({**calm, "b": jnp.array([2.1, 1.9])}, state)
    assert sg.metrics(state)["schedule_cuts"] == 2


@pytest.mark.slow
def test_thresholds_learn_from_the_steps_they_see():
    rule = sg.ema_ratio(2.0, of="value", decay=0.8, warmup_steps=10)
    values = np.linspace(30.0, 3.0, 60)
    values[50] = 20.0
    for door in DOORS.values():
        tx = door(1.0, rule)
        _, told, _ = jax.jit(lambda tx=tx: rates(tx, np.ones(60), values))()
        fell = np.flatnonzero(np.diff(told["schedule_lr_scale"]) < 0) + 1
        np.testing.assert_array_equal(fell, [50])


def test_updates_that_are_not_finite_become_zeros_and_are_counted():
    tx = sg.scale_by_explosion_aware_schedule(0.1, sg.fixed(LIMIT))
    bad = {"w": jnp.array([jnp.nan, 1.0])}
    updates, state = jax.jit(tx.update)(bad, tx.init(PARAMS))
    np.testing.assert_array_equal(updates["w"], 0.0)
    assert sg.metrics(state)["schedule_dropped_steps"] == 1


def test_updates_are_clipped_only_while_the_scale_is_low():
    tx = sg.scale_by_explosion_aware_schedule(
        1.0,
        sg.fixed(LIMIT, of="value"),
        factor=0.5,
        limit=sg.fixed(2.0),
        limit_below=0.3,
        hold_steps=0,
        regrow_steps=1,
    )
    values = [1.0, 9.0, 9.0, 1.0, 1.0, 1.0]
    norms = [4.0, 4.0, 4.0, 1.0, 4.0, 4.0]
    seen, told, _ = jax.jit(lambda: rates(tx, norms, values))()
    np.testing.assert_allclose(
        told["schedule_lr_scale"], [1, 0.5, 0.25, 0.25, 0.5, 1], rtol=RTOL
    )
    # The third is clipped to half of its norm, the fourth is small enough.
    np.testing.assert_allclose(seen, [1, 0.5, 0.125, 0.25, 0.5, 1], rtol=RTOL)


@pytest.mark.slow
def test_inside_a_guard_a_rejected_step_moves_nothing():
    explosion = sg.fixed(LIMIT, of="value")
    tx = sg.guard(
        sg.scale_by_explosion_aware_schedule(base, explosion, advance="always"),
        sg.skip(explosion),
    )
    _, told, _ = jax.jit(lambda: rates(tx, np.ones(4), [1.0, 9.0, 9.0, 1.0]))()
    np.testing.assert_array_equal(told["schedule_position"], [1, 1, 1, 2])
    np.testing.assert_array_equal(told["schedule_lr_scale"], 1.0)
    np.testing.assert_array_equal(told["skipped_steps"], [0, 1, 2, 2])


def test_a_schedule_watches_what_is_passed_to_update():
    passed = sg.fixed(LIMIT, of=lambda updates, params, extra: extra["size"])
    rate = sg.explosion_aware_schedule(0.1, passed)
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    for size in (1.0, 9.0):
        _, state = step(PARAMS, state, PARAMS, size=size)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.05, rtol=RTOL)


@pytest.mark.parametrize(
    "rule", [sg.fixed(1.0), sg.zscore(6.0, of="update_norm"), sg.param_ratio(0.1)]
)
def test_a_schedule_that_is_to_watch_a_norm_is_an_error_that_shows_every_fix(rule):
    with pytest.raises(ValueError) as caught:
        sg.explosion_aware_schedule(0.1, sg.fixed(1.0, of="value"), rule)
    for fix in (
        "never sees a gradient",
        "tx.update(grads, state, params, value=loss)",
        "of=lambda updates, params, extra: extra['norm']",
        "`scale_by_explosion_aware_schedule`",
        "`back_off`",
    ):
        assert fix in str(caught.value)


@every_door
def test_a_missing_value_is_an_error_that_shows_the_fix(door):
    tx = DOORS[door](0.1, sg.fixed(LIMIT, of="value"))
    state = tx.init(PARAMS)
    for extra in ({}, {"loss": 1.0}):
        with pytest.raises(ValueError, match="the step got no `value=`. Pass it:"):
            tx.update(PARAMS, state, PARAMS, **extra)


def test_a_chain_that_is_to_watch_the_outgoing_update_is_an_error():
    rule = sg.fixed(1.0, of="update_norm")
    with pytest.raises(ValueError, match="what reaches it is of='grad_norm'"):
        sg.scale_by_explosion_aware_schedule(0.1, rule)
    with pytest.raises(ValueError, match="what reaches it is of='grad_norm'"):
        sg.scale_by_explosion_aware_schedule(0.1, sg.fixed(1.0), limit=rule)


BUILDERS = [sg.scale_by_explosion_aware_schedule, sg.explosion_aware_schedule]
every_builder = pytest.mark.parametrize("build", BUILDERS)


@every_builder
def test_wrong_pieces_are_errors_that_name_the_asker(build):
    rule = sg.fixed(1.0, of="value")
    with pytest.raises(ValueError, match=f"`{build.__name__}` must be given at least"):
        build(0.1)
    with pytest.raises(TypeError, match=f"`{build.__name__}` takes thresholds"):
        build(0.1, 6.0)
    for wrong in ("cosine", None, True, rule):
        with pytest.raises(TypeError, match="`schedule` must be a number or a functi"):
            build(wrong, rule)


@every_builder
@pytest.mark.parametrize(
    "name, value",
    [
        ("factor", 1.0),
        ("confirm_steps", 0),
        ("hold_steps", -1),
        ("hold_steps", 1.5),
        ("regrow_steps", 0),
        ("regrow_steps", 2**40),
        ("min_scale", 0.0),
        ("advance", "never"),
    ],
)
def test_rejects_arguments_out_of_range(build, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value!r}"):
        build(0.1, sg.fixed(1.0, of="value"), **{name: value})


@pytest.mark.slow
def test_bfloat16_parameters_train_with_adam_if_hyperparameters_are_float32():
    rate = sg.explosion_aware_schedule(1e-3, sg.fixed(LIMIT, of="value"))
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    for dtype, finite in ((jnp.float32, True), (None, False)):
        injected = optax.inject_hyperparams(optax.adam, hyperparam_dtype=dtype)
        tx = injected(learning_rate=rate)
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params, value=1.0)
        assert bool(jnp.isfinite(updates["w"]).all()) is finite


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_of_any_dtype_train_at_a_float32_rate(dtype):
    rate = sg.explosion_aware_schedule(1e-3, sg.fixed(LIMIT, of="value"), factor=0.3)
    # By default, optax before 0.2.8 takes the parameters' dtype.
    injected = optax.inject_hyperparams(optax.scale, hyperparam_dtype=jnp.float32)
    tx = injected(step_size=rate)
    params = {"w": jnp.ones(3, dtype)}
    run = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)
    before = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    for value in (1.0, 9.0, jnp.nan):
        _, state = run(params, state, params, value=jnp.asarray(value))
    after = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    rate_now = state.hyperparams["step_size"]
    assert rate_now.dtype == jnp.float32
    np.testing.assert_allclose(rate_now, 3e-4, rtol=RTOL)
    assert after.hyperparams_states == before.hyperparams_states
    assert after.hyperparams == before.hyperparams


@pytest.mark.slow
def test_a_wide_schedule_scales_wide_updates_without_rounding(x64):
    tx = sg.scale_by_explosion_aware_schedule(lambda step: 0.1, sg.fixed(LIMIT))
    params = {"w": jnp.array([1.0], jnp.float64)}
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = jax.jit(tx.update)(params, tx.init(params))
    assert updates["w"].item() == 0.1


def test_a_schedule_without_inject_hyperparams_is_an_error_that_shows_the_fix():
    tx = optax.sgd(sg.explosion_aware_schedule(0.1, sg.fixed(LIMIT, of="value")))
    state = tx.init(PARAMS)
    for step in (tx.update, jax.jit(tx.update)):
        with pytest.raises(TypeError, match=r"`optax.inject_hyperparams\(optax.adamw"):
            step(PARAMS, state, PARAMS)


def test_the_schedule_is_what_optax_calls_a_stateful_schedule():
    rate = sg.explosion_aware_schedule(base, sg.fixed(LIMIT, of="value"))
    assert isinstance(rate, optax.schedules.StatefulSchedule)
    state = rate.init()
    assert rate(state) == 0.5  # As asked at `init`, without a loss.
    state = rate.update(state, value=1.0)
    np.testing.assert_allclose(rate(state, value=9.0), 0.25 / 1.1, rtol=RTOL)
    np.testing.assert_allclose(rate(state), 0.5 / 1.1, rtol=RTOL)


@pytest.mark.slow
def test_a_second_schedule_is_numbered_in_the_metrics():
    first = sg.scale_by_explosion_aware_schedule(0.5, sg.fixed(LIMIT))
    second = sg.scale_by_explosion_aware_schedule(0.25, sg.fixed(LIMIT))
    tx = optax.chain(first, second)
    _, state = tx.update(PARAMS, tx.init(PARAMS))
    told = sg.metrics(state)
    assert told["schedule_rate"] == 0.5 and told["schedule_2_rate"] == 0.25
    assert len(told) == 10


@pytest.mark.slow
def test_settings_may_be_swept_under_vmap():
    def last_rate(factor, rate):
        rule = sg.fixed(LIMIT, of="value")
        tx = sg.scale_by_explosion_aware_schedule(rate, rule, factor=factor)
        return rates(tx, np.ones(2), [1.0, 9.0])[0][-1]

    swept = jax.vmap(last_rate)(jnp.array([0.5, 0.25]), jnp.array([0.1, 1.0]))
    np.testing.assert_allclose(swept, [0.05, 0.25], rtol=RTOL)


def test_nnx_trains_with_an_injected_schedule():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    rate = sg.explosion_aware_schedule(0.1, sg.fixed(LIMIT, of="value"))
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, loss):
        grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
        optimizer.update(model, grads, value=loss)

    before = nnx.to_pure_dict(nnx.state(model))["bias"]
    for loss in (1.0, 9.0, 1.0):
        step(model, optimizer, loss)
    moved = nnx.to_pure_dict(nnx.state(model))["bias"] - before
    np.testing.assert_allclose(moved, -(0.1 + 0.05 + 0.05), rtol=RTOL)
    told = sg.metrics(optimizer)
    assert told["schedule_cuts"] == 1 and told["schedule_position"] == 3


@pytest.mark.parametrize("rate", [np.nan, np.inf, -1.0, np.ones(2)])
def test_a_rate_that_is_no_rate_is_an_error(rate):
    with pytest.raises(ValueError, match="`schedule` must be one finite number >= 0"):
        sg.explosion_aware_schedule(rate, sg.fixed(3.0))
