"""Tests for `stablegrad.back_off`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from helpers.training import of_norm, scan

import stablegrad as sg
from stablegrad.granularity._groups import independent
from stablegrad.thresholds._base import unobserved

RTOL = 1e-5  # float32 products over a few hundred steps.
PARAMS = {"w": jnp.zeros(2)}
LIMIT = jnp.full(1, jnp.inf)
WATCHED = sg.clip(sg.fixed(1e9, of="update_norm"))  # Measures, and clips nothing.


def oracle(values, taken, factor, confirm, hold, regrow, floor):
    """The docstring's recurrence in float64: the factor on each step's update."""
    k, left, run, blame, last, before, seen = 1.0, 0, 0, False, 0.0, 0.0, []
    for value, a in zip(values, taken, strict=True):
        e, over = value > 5.0, value - 5.0
        run = 0 if not e else 1 if over < before else run + 1
        before = over if e else before
        if e and run >= confirm and blame and (left == 0 or over > 2 * last):
            k, blame, last = max(factor * k, floor), False, over
        seen.append(k)
        if e and run >= confirm:
            left = hold
        if a and not e:
            if left > 0:
                left -= 1
            else:
                k = min(1.0, k * factor ** (-1 / regrow))
        blame = blame or a
    return np.array(seen)


def run(norms, values, *skips, **options):
    """The factor that each step was scaled by, and the final metrics."""
    explosion = sg.back_off(sg.fixed(5.0, of="value"), **options)
    tx = sg.guard(optax.sgd(1.0), explosion, *skips)
    _, state, (params, seen, _) = scan(tx, of_norm(norms), PARAMS, values)
    return seen, params, state


@pytest.mark.slow
@pytest.mark.parametrize("confirm", core([1, 2, 3], 2))
@pytest.mark.parametrize(
    "hold, regrow, floor", core([(0, 7, 1e-4), (5, 20, 0.3)], (5, 20, 0.3))
)
def test_matches_the_float64_oracle(confirm, hold, regrow, floor):
    rng = np.random.default_rng(0)
    values = np.where(rng.random(300) < 0.25, rng.integers(7, 10, 300), 1.0)
    values[200:220] = np.geomspace(9.0, 900.0, 20)
    rejected = rng.random(300) < 0.3
    seen, _, _ = run(
        np.where(rejected, np.nan, 1.0),
        values,
        sg.skip(),
        factor=0.5,
        confirm_steps=confirm,
        hold_steps=hold,
        regrow_steps=regrow,
        min_scale=floor,
    )
    expected = oracle(values, ~rejected, 0.5, confirm, hold, regrow, floor)
    np.testing.assert_allclose(seen["lr_scale"], expected, rtol=RTOL)


@pytest.mark.slow
def test_the_cut_applies_to_the_step_that_exploded():
    seen, params, _ = run(np.ones(3), [1.0, 9.0, 1.0], WATCHED, factor=0.25)
    np.testing.assert_allclose(seen["lr_scale"], [1.0, 0.25, 0.25], rtol=RTOL)
    steps = -np.diff(np.concatenate([[0.0], params["w"][:, 0]])) * np.sqrt(2)
    np.testing.assert_allclose(steps, [1.0, 0.25, 0.25], rtol=RTOL)
    np.testing.assert_allclose(seen["update_norm"], [1.0, 0.25, 0.25], rtol=RTOL)


@pytest.mark.slow
def test_regrowth_undoes_one_cut_in_regrow_steps_and_stops_at_one():
    values = np.ones(60)
    values[1] = 9.0
    seen, _, _ = run(np.ones(60), values, factor=0.5, hold_steps=3, regrow_steps=20)
    scale = np.asarray(seen["lr_scale"])
    np.testing.assert_allclose(scale[2:6], 0.5, rtol=RTOL)  # Three calm steps held.
    np.testing.assert_allclose(scale[6], 0.5 * 2 ** (1 / 20), rtol=RTOL)
    assert scale[24] < 1 and scale[26] == 1
    assert scale.max() == 1


@pytest.mark.slow
def test_a_run_of_rejected_steps_cuts_once():
    values = np.array([1.0, 9.0, 9.0, 9.0, 9.0, 1.0])
    seen, _, state = run(np.ones(6), values, sg.skip(sg.fixed(5.0, of="value")))
    np.testing.assert_allclose(seen["lr_scale"][1:], 0.5, rtol=RTOL)
    assert sg.metrics(state)["backed_off_steps"] == 1


@pytest.mark.slow
def test_a_slow_regrowth_is_not_lost_to_rounding():
    # One step of it is less than float32 can add to 1.
    rule = sg.back_off(sg.nonfinite(), factor=0.99, hold_steps=0, regrow_steps=10**6)
    calm = (
        unobserved(rule.thresholds[0], LIMIT, independent(1))._replace(
            signal=jnp.ones(1)
        ),
    )
    state = rule.init_state()._replace(
        scale_at_cut=jnp.float32(0.99), regrown_steps=jnp.int32(10**6 - 1)
    )
    assert rule.propose(state, calm).lr_scale < 1 - 1e-9
    after = rule.settle(state, calm, jnp.int32(0))
    assert after.regrown_steps == 10**6
    state = state._replace(regrown_steps=jnp.int32(10**6 + 100))
    assert rule.propose(state, calm).lr_scale == 1


@pytest.mark.slow
def test_a_traced_factor_of_nan_neither_scales_nor_stays():
    def run_with(factor):
        rule = sg.back_off(sg.fixed(5.0, of="value"), factor=factor)
        tx = sg.guard(optax.sgd(1.0), rule)
        values = jnp.array([1.0, 9.0, 1.0])
        return scan(tx, of_norm(np.ones(3)), PARAMS, values)[2]

    params, seen, _ = jax.jit(run_with)(jnp.nan)
    assert np.isfinite(params["w"]).all()
    np.testing.assert_array_equal(seen["lr_scale"], 1.0)


@pytest.mark.slow
def test_a_rise_that_lasts_cuts_once():
    seen, _, state = run(np.ones(200), np.array([1.0] + [9.0] * 199))
    np.testing.assert_allclose(seen["lr_scale"][1:], 0.5, rtol=RTOL)
    assert sg.metrics(state)["backed_off_steps"] == 1


@pytest.mark.slow
def test_what_keeps_rising_is_followed_down_to_the_floor():
    values = 5.0 + np.array([-4.0, 4.0, 7.9, 8.1, 16.1, 16.3, 33.0, 70.0])
    seen, _, _ = run(np.ones(8), values, factor=0.5, min_scale=0.1)
    expected = [1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.1, 0.1]
    np.testing.assert_allclose(seen["lr_scale"], expected, rtol=RTOL)


@pytest.mark.slow
def test_calm_arms_the_next_cut():
    values = np.array([1.0, 9.0, 1.0, 9.0, 1.0, 1.0, 1.0, 9.0])
    options = {"hold_steps": 2, "regrow_steps": 10**6}
    seen, _, _ = run(np.ones(8), values, factor=0.5, **options)
    expected = [1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25]
    np.testing.assert_allclose(seen["lr_scale"], expected, rtol=1e-4)


@pytest.mark.slow
def test_without_a_hold_every_explosion_cuts():
    seen, _, _ = run(np.ones(4), [1.0, 9.0, 9.0, 9.0], hold_steps=0)
    np.testing.assert_allclose(seen["lr_scale"], [1, 0.5, 0.25, 0.125], rtol=RTOL)


@pytest.mark.slow
def test_a_rise_of_another_signal_is_a_further_rise():
    rule = sg.back_off(sg.fixed(5.0, of="value"), sg.fixed(5.0))
    tx = sg.guard(optax.sgd(1e-6), rule)
    norms, values = [1.0, 1.0, 1.0, 9.0], [1.0, 9.0, 9.0, 9.0]
    _, _, (_, seen, _) = scan(tx, of_norm(norms), PARAMS, values)
    np.testing.assert_allclose(seen["lr_scale"], [1, 0.5, 0.5, 0.25], rtol=RTOL)


@pytest.mark.slow
def test_the_first_step_of_all_is_never_the_learning_rates_fault():
    seen, _, _ = run(np.ones(2), [9.0, 1.0])
    np.testing.assert_array_equal(seen["lr_scale"], [1.0, 1.0])


@pytest.mark.slow
def test_a_single_bad_batch_costs_nothing_with_two_to_confirm():
    values = np.ones(40)
    values[[5, 15, 25]] = 9.0
    seen, _, _ = run(np.ones(40), values, confirm_steps=2)
    np.testing.assert_array_equal(seen["lr_scale"], 1.0)


def test_a_refused_step_does_not_confirm_a_rise():
    values = np.r_[np.ones(5), np.full(4, 9.0), np.arange(8.5, 6.5, -0.5), np.ones(5)]
    norms = np.where(np.arange(values.size) // 4 == 1, 1e3, 1.0)
    norms[4], norms[8] = 1.0, 1e3
    skip = sg.skip(sg.fixed(10.0))
    seen, _, _ = run(norms, values, skip, confirm_steps=3)
    assert seen["skipped"].sum() == 4
    np.testing.assert_array_equal(seen["lr_scale"], 1.0)
    seen, _, _ = run(np.ones(values.size), values, skip, confirm_steps=3)
    assert seen["lr_scale"].min() == 0.5


@pytest.mark.slow
def test_a_rise_that_fades_is_not_confirmed():
    values = [1.0, 9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 8.0, 8.0, 9.0]
    seen, _, _ = run(np.ones(10), values, confirm_steps=2)
    np.testing.assert_allclose(seen["lr_scale"], [1] * 8 + [0.5] * 2, rtol=RTOL)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_an_explosion_only_if_asked_for():
    values = [1.0, np.nan, np.nan, 1.0]
    seen, _, _ = run(np.ones(4), values)
    np.testing.assert_array_equal(seen["lr_scale"], 1.0)
    tx = sg.guard(optax.sgd(1.0), sg.back_off(sg.nonfinite(of="value"), factor=0.5))
    _, _, (_, seen, _) = scan(tx, of_norm(np.ones(4)), PARAMS, values)
    np.testing.assert_allclose(seen["lr_scale"], [1.0, 0.5, 0.5, 0.5], rtol=RTOL)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_does_not_end_a_run_of_explosions():
    seen, _, _ = run(np.ones(5), [1.0, 9.0, np.nan, 9.0, 1.0], confirm_steps=2)
    np.testing.assert_allclose(seen["lr_scale"], [1, 1, 1, 0.5, 0.5], rtol=RTOL)


@pytest.mark.slow
def test_settings_may_be_swept_under_vmap():
    def last_scale(factor, regrow_steps):
        rule = sg.back_off(
            sg.fixed(5.0, of="value"),
            factor=factor,
            hold_steps=0,
            regrow_steps=regrow_steps,
        )
        tx = sg.guard(optax.sgd(1.0), rule)
        values = jnp.array([1.0, 9.0, 1.0, 1.0])
        _, _, (_, seen, _) = scan(tx, of_norm(np.ones(4)), PARAMS, values)
        return seen["lr_scale"][-1]

    swept = jax.vmap(last_scale)(jnp.array([0.5, 0.25]), jnp.array([4, 8]))
    expected = [0.5 * 2 ** (1 / 4), 0.25 * 4 ** (1 / 8)]
    np.testing.assert_allclose(swept, expected, rtol=RTOL)


@pytest.mark.parametrize(
    "name, value",
    [
        ("factor", 1.0),
        ("factor", 0.0),
        ("factor", np.nan),
        ("confirm_steps", 0),
        ("hold_steps", -1),
        ("hold_steps", 1.5),
        ("regrow_steps", 0),
        ("regrow_steps", np.inf),
        ("regrow_steps", 2**31),
        ("min_scale", 0.0),
        ("min_scale", 1.5),
    ],
)
def test_rejects_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value}"):
        sg.back_off(sg.nonfinite(), **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("number", [np.int64, np.float32, jnp.int32])
def test_steps_may_be_whole_numbers_of_any_kind(number):
    rule = sg.back_off(sg.nonfinite(), hold_steps=number(3), regrow_steps=number(4))
    calm = unobserved(rule.thresholds[0], LIMIT, independent(1))
    bad = (calm._replace(nonfinite=jnp.ones(1, bool)),)
    state = rule.settle(rule.init_state()._replace(may_cut=jnp.array(True)), bad, 0)
    assert state.hold_left == 3 and state.hold_left.dtype == jnp.int32
    calm = (calm._replace(nonfinite=jnp.zeros(1, bool)),)
    state = state._replace(regrown_steps=jnp.int32(2))  # Half of the way.
    scale = rule.propose(state, calm).lr_scale
    np.testing.assert_allclose(scale, 0.5**0.5, rtol=RTOL)


def test_steps_that_are_traced_must_be_integers():
    build = lambda steps: sg.back_off(sg.nonfinite(), hold_steps=steps).init_state()
    jax.eval_shape(build, 3)
    with pytest.raises(ValueError, match="`hold_steps` must be an integer >= 0, got"):
        jax.eval_shape(build, 1.5)


def test_rejects_a_back_off_from_nothing():
    with pytest.raises(ValueError, match="at least one threshold"):
        sg.back_off()


@pytest.mark.slow
def test_several_back_offs_multiply():
    rules = [sg.back_off(sg.fixed(5.0, of="value"), factor=0.5) for _ in range(2)]
    tx = sg.guard(optax.sgd(1.0), *rules)
    _, _, (_, seen, _) = scan(tx, of_norm(np.ones(2)), PARAMS, [1.0, 9.0])
    np.testing.assert_allclose(seen["lr_scale"], [1.0, 0.25], rtol=RTOL)


def limited(norms, values, inner=None, explosion=None, **options):
    """What a back-off with a limit does to gradients of some norms, step by step."""
    explosion = explosion or sg.fixed(5.0, of="value")
    options = {"factor": 0.5, "hold_steps": 0, "regrow_steps": 1, **options}
    tx = sg.guard(inner or optax.sgd(1.0), sg.back_off(explosion, **options), WATCHED)
    return scan(tx, of_norm(norms), PARAMS, values)[2][1]


@pytest.mark.slow
def test_the_gradient_is_clipped_only_while_the_rate_is_low():
    seen = limited(
        norms=[4.0, 4.0, 4.0, 1.0, 4.0, 4.0],
        values=[1.0, 9.0, 9.0, 1.0, 1.0, 1.0],
        limit=sg.fixed(2.0),
        limit_below=0.3,
    )
    scale = [1, 0.5, 0.25, 0.25, 0.5, 1]
    np.testing.assert_allclose(seen["lr_scale"], scale, rtol=RTOL)
    # Below 0.3 at the third and the fourth step, the latter of which is small.
    np.testing.assert_allclose(seen["clip_scale"], [1, 1, 0.5, 1, 1, 1], rtol=RTOL)
    applied = [4, 2, 0.5, 0.25, 2, 4]
    np.testing.assert_allclose(seen["update_norm"], applied, rtol=RTOL)


@pytest.mark.slow
def test_a_limit_is_in_force_by_default_whenever_the_rate_is_lowered():
    seen = limited([4.0] * 3, [1.0, 9.0, 1.0], limit=sg.fixed(2.0), hold_steps=9)
    np.testing.assert_allclose(seen["clip_scale"], [1, 0.5, 0.5], rtol=RTOL)


@pytest.mark.slow
def test_exceeding_the_limit_is_no_explosion_and_its_nan_no_reason_to_wait():
    signal = lambda updates, params, extra: jnp.float32(np.nan)
    seen = limited([9.0] * 3, [1.0] * 3, limit=sg.fixed(2.0))
    np.testing.assert_array_equal(seen["lr_scale"], 1.0)
    seen = limited([1.0] * 4, [1.0, 9.0, 1.0, 1.0], limit=sg.fixed(2.0, of=signal))
    np.testing.assert_allclose(seen["lr_scale"], [1, 0.5, 0.5, 1], rtol=RTOL)


@pytest.mark.slow
def test_a_limit_learns_what_is_normal_from_every_step():
    norms, values = np.ones(60), np.ones(60)
    values[50:] = 9.0
    norms[55] = 100.0
    seen = limited(norms, values, limit=sg.zscore(2.5), limit_below=0.9)
    assert seen["clip_scale"][55] < 0.02
    assert seen["back_off_zscore_grad_norm_limit"][40] < 1.5


@pytest.mark.slow
def test_a_limit_may_be_on_the_update_leaf_by_leaf():
    seen = limited(
        [1.0] * 2,
        [1.0, 9.0],
        inner=optax.sgd(10.0),
        limit=sg.fixed(2.0, of="update_norm", per="leaf"),
    )
    np.testing.assert_allclose(seen["clip_scale"], [1, 0.2], rtol=RTOL)
    np.testing.assert_allclose(seen["update_norm"], [10, 0.5 * 2], rtol=RTOL)


@pytest.mark.slow
def test_an_exploding_update_clips_the_update_at_once_and_the_next_gradient():
    explosion = sg.fixed(5.0, of="update_norm")
    options = {"explosion": explosion, "hold_steps": 9}
    norms, values = [1.0, 8.0, 4.0], [1.0] * 3
    seen = limited(norms, values, limit=sg.fixed(2.0), **options)
    np.testing.assert_allclose(seen["update_norm"], [1, 4, 1], rtol=RTOL)
    np.testing.assert_allclose(seen["clip_scale"], [1, 1, 0.5], rtol=RTOL)
    rule = sg.fixed(2.0, of="update_norm")
    seen = limited(norms, values, limit=rule, **options)
    np.testing.assert_allclose(seen["update_norm"], [1, 1, 1], rtol=RTOL)


def test_a_limit_on_the_loss_or_out_of_range_is_an_error():
    rule = sg.nonfinite()
    with pytest.raises(ValueError, match="`limit` must watch a norm"):
        sg.back_off(rule, limit=sg.fixed(1.0, of="value"))
    with pytest.raises(TypeError, match="`back_off` takes thresholds"):
        sg.back_off(rule, limit=1.0)
    with pytest.raises(ValueError, match=r"`limit_below` must be in \(0, 1\], got 0"):
        sg.back_off(rule, limit=sg.fixed(1.0), limit_below=0)
