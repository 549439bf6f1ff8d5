"""Tests for `stablegrad.reduce_on_plateau`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from hypothesis import given, settings, strategies as st

import stablegrad as sg

RTOL = 1e-6  # float32 products of few factors.
PARAMS = {"w": jnp.array([1.0, -2.0])}
STEPS = 40


def scales(tx, values):
    """The factor on every step's updates, and the final state."""

    def step(state, value):
        updates, state = tx.update(PARAMS, state, PARAMS, value=value)
        return state, updates["w"][0]

    run = jax.jit(lambda xs: jax.lax.scan(step, tx.init(PARAMS), xs))
    state, seen = run(jnp.asarray(values, jnp.float32))
    return np.asarray(seen), state


def cuts(values, **options):
    """At which steps the scale falls, from 0."""
    seen, _ = scales(sg.reduce_on_plateau(**options), values)
    return np.flatnonzero(np.diff(seen, prepend=1.0) < 0).tolist()


def torch_rule(values, o):
    """`torch.optim.lr_scheduler.ReduceLROnPlateau.step`, without its eps."""
    best, bad, rest, scale, seen = None, 0, 0, 1.0, []
    for a in values:
        if best is None:
            better = True
        elif o["mode"] == "min":
            rel = o["threshold_mode"] == "rel"
            limit = best * (1 - o["threshold"]) if rel else best - o["threshold"]
            better = a < limit
        else:
            rel = o["threshold_mode"] == "rel"
            limit = best * (1 + o["threshold"]) if rel else best + o["threshold"]
            better = a > limit
        if better:
            best, bad = a, 0
        else:
            bad += 1
        if rest > 0:
            rest, bad = rest - 1, 0
        if bad > o["patience"]:
            scale, rest, bad = (
                max(scale * o["factor"], o["min_scale"]),
                o["cooldown"],
                0,
            )
        seen.append(scale)
    return seen


def keras_rule(values, o):
    """`keras.callbacks.ReduceLROnPlateau.on_epoch_end`."""
    sign = 1 if o["mode"] == "min" else -1
    best, wait, rest, scale, seen = np.inf, 0, 0, 1.0, []
    for a in values:
        if rest > 0:
            rest, wait = rest - 1, 0
        if sign * a < best - o["threshold"]:
            best, wait = sign * a, 0
        elif rest <= 0:
            wait += 1
            if wait >= o["patience"] and scale > o["min_scale"]:
                scale = max(scale * o["factor"], o["min_scale"])
                rest, wait = o["cooldown"], 0
        seen.append(scale)
    return seen


def optax_rule(values, o):
    """The order of `optax.contrib.reduce_on_plateau`, for patience > 0."""
    best, plateau, rest, scale, seen = np.inf, 0, 0, 1.0, []
    for a in values:
        better = a < (1 - o["threshold"]) * best
        best, plateau = (a, 0) if better else (best, plateau + 1)
        if rest > 0:
            rest, plateau = rest - 1, 0
        elif plateau == o["patience"]:
            scale, rest, plateau = (
                max(scale * o["factor"], o["min_scale"]),
                o["cooldown"],
                0,
            )
        seen.append(scale)
    return seen


RULES = {"torch": torch_rule, "keras": keras_rule, "optax": optax_rule}


@functools.cache
def compiled(**static):
    """One program for every numerical setting of a rule."""

    def run(numbers, values):
        tx = sg.reduce_on_plateau(**static, **numbers)

        def step(state, value):
            updates, state = tx.update(PARAMS, state, value=value)
            return state, updates["w"][0]

        return jax.lax.scan(step, tx.init(PARAMS), values)[1]

    return jax.jit(run)


# Eighths, so that no comparison depends on rounding.
EIGHTHS = st.integers(1, 24).map(lambda n: n / 8)
NUMBERS = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([0.5, 0.25]),
        "patience": st.integers(0, 3),
        "threshold": st.sampled_from([0.0, 0.125, 0.25]),
        "cooldown": st.integers(0, 3),
        "min_scale": st.sampled_from([0.0, 0.125, 0.3]),
    }
)


SETTINGS = [
    ("torch", "min", "rel"),
    ("torch", "max", "rel"),
    ("torch", "min", "abs"),
    ("torch", "max", "abs"),
    ("keras", "min", "abs"),
    ("keras", "max", "abs"),
    ("optax", "min", "rel"),
]


@pytest.mark.parametrize(
    "convention, mode, threshold_mode",
    core(SETTINGS, SETTINGS[0], SETTINGS[5], SETTINGS[6]),
)
def test_matches_the_float64_oracle_of_each_convention(
    convention, mode, threshold_mode
):
    static = {"convention": convention, "mode": mode, "threshold_mode": threshold_mode}
    run = compiled(**static)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(NUMBERS, st.lists(EIGHTHS, min_size=STEPS, max_size=STEPS))
    def check(numbers, values):
        if convention == "optax":
            numbers = {**numbers, "patience": max(numbers["patience"], 1)}
        expected = RULES[convention](values, {**static, **numbers})
        seen = run(numbers, jnp.asarray(values, jnp.float32))
        np.testing.assert_allclose(seen, expected, rtol=RTOL)

    check()


@pytest.mark.parametrize("window", [1, 3])
def test_matches_optax_itself(window):
    values = 4 + np.random.default_rng(1).normal(size=200) * np.linspace(1, 0.1, 200)
    options = {"factor": 0.5, "patience": 2, "cooldown": 3, "min_scale": 0.01}
    theirs = optax.contrib.reduce_on_plateau(
        **options, rtol=0.01, accumulation_size=window
    )
    ours = sg.reduce_on_plateau(
        **options, threshold=0.01, window=window, convention="optax"
    )
    expected, _ = scales(theirs, values)
    assert len(np.unique(expected)) > 4
    np.testing.assert_allclose(scales(ours, values)[0], expected, rtol=RTOL)


@pytest.mark.parametrize(
    "convention, expected",
    [("torch", [3, 8, 13]), ("keras", [2, 5, 8, 11]), ("optax", [2, 6, 10])],
)
def test_golden_cuts_of_a_flat_metric(convention, expected):
    options = {"factor": 0.5, "patience": 2, "cooldown": 2, "convention": convention}
    assert cuts(np.ones(14), **options) == expected


@pytest.mark.parametrize("convention", RULES)
def test_without_patience_every_bad_evaluation_cuts_and_no_good_one(convention):
    values = [1.0, 0.9, 0.8, 0.8, 0.8, 0.7]
    assert cuts(values, factor=0.5, patience=0, convention=convention) == [3, 4]


@pytest.mark.slow
def test_the_first_evaluation_is_never_bad():
    assert cuts([1e30], patience=0) == cuts([-1e30], patience=0, mode="max") == []


@pytest.mark.slow
@pytest.mark.parametrize("mode, sign", [("min", 1.0), ("max", -1.0)])
@pytest.mark.parametrize("best", core([-1.0, 1.0], -1.0))
def test_a_worse_metric_is_never_better_whatever_its_sign(mode, sign, best):
    # Within the margin of 10 %: worse, equal, and too little better.
    for change in (0.05, 0.0, -0.05):
        values = [sign * best, sign * best + sign * change]
        assert cuts(values, patience=0, mode=mode, threshold=0.1) == [1]
    values = [sign * best, sign * best - sign * 0.15]
    _, state = scales(sg.reduce_on_plateau(mode=mode, threshold=0.1), values)
    np.testing.assert_allclose(sg.metrics(state)["plateau_best"], values[1])


def test_an_absolute_threshold_is_in_the_metrics_unit():
    options = {"patience": 0, "threshold": 0.5, "threshold_mode": "abs"}
    assert cuts([100.0, 99.4, 99.0, 98.4], **options) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("bad, window", [(np.nan, 1), (np.inf, 2), (-np.inf, 1)])
def test_a_metric_that_is_not_finite_is_counted_and_otherwise_ignored(bad, window):
    values = [2.0, 2.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5]
    tx = sg.reduce_on_plateau(0.5, patience=1, window=window)
    expected, _ = scales(tx, values)
    spoilt = np.array([[bad, value, bad, bad] for value in values]).ravel()
    seen, state = scales(tx, spoilt)
    np.testing.assert_array_equal(seen[1::4], expected)
    told = sg.metrics(state)
    assert told["plateau_ignored_metrics"] == 24
    assert told["plateau_evaluations"] == 8 // window
    chex.assert_tree_all_finite(state)


def test_a_best_not_yet_seen_is_nan_in_the_metrics_and_nothing_in_the_state():
    state = sg.reduce_on_plateau().init(PARAMS)
    chex.assert_tree_all_finite(state)
    assert jnp.isnan(sg.metrics(state)["plateau_best"])


def test_the_mean_of_a_window_is_one_evaluation():
    # Means 2, 2, 1: a cut at the end of the second window.
    values = [1.0, 3.0, 0.0, 4.0, 2.0, 0.0]
    assert cuts(values, patience=0, window=2) == [3]
    _, state = scales(sg.reduce_on_plateau(patience=0, window=2), values)
    assert sg.metrics(state)["plateau_best"] == 1.0


def test_a_window_of_huge_values_has_a_finite_mean():
    huge = float(np.finfo(np.float32).max)
    _, state = scales(sg.reduce_on_plateau(window=2), [huge, -huge, huge, huge])
    chex.assert_tree_all_finite(state)
    assert abs(sg.metrics(state)["plateau_best"]) < 1e32


def test_evaluations_before_the_start_are_not_looked_at():
    # Two windows: neither their best nor their number counts.
    values = [0.1, 0.1, 0.2, 0.2, 5.0, 5.0, 5.0, 5.0, 4.0, 4.0]
    assert cuts(values, patience=0, window=2, start_after=2) == [7]
    _, state = scales(sg.reduce_on_plateau(window=2, start_after=2), values)
    assert sg.metrics(state)["plateau_best"] == 4.0


def test_the_scale_stops_at_the_floor_and_only_falls_are_counted():
    tx = sg.reduce_on_plateau(0.5, patience=0, min_scale=0.2)
    seen, state = scales(tx, np.ones(6))
    np.testing.assert_allclose(seen, [1, 0.5, 0.25, 0.2, 0.2, 0.2], rtol=RTOL)
    assert sg.metrics(state)["plateau_cuts"] == 3


@pytest.mark.parametrize("convention, bad", [("torch", 0), ("keras", 3), ("optax", 0)])
def test_at_the_floor_keras_alone_counts_on(convention, bad):
    tx = sg.reduce_on_plateau(0.5, 1, min_scale=0.5, convention=convention)
    steps = 5 if convention != "torch" else 7
    _, state = scales(tx, np.ones(steps))
    told = sg.metrics(state)
    assert told["plateau_scale"] == 0.5 and told["plateau_bad_evaluations"] == bad


def test_a_cut_reaches_the_updates_of_its_own_step_and_keeps_their_dtypes():
    tx = sg.reduce_on_plateau(0.5, patience=0)
    params = {"half": jnp.ones(2, jnp.bfloat16), "index": jnp.arange(2)}
    state = tx.init(params)
    step, updates = jax.jit(tx.update), params
    for _ in range(2):
        updates, state = step(params, state, value=1.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    np.testing.assert_array_equal(updates["half"].astype(jnp.float32), 0.5)
    np.testing.assert_array_equal(updates["index"], params["index"])


def test_bfloat16_parameters_do_not_round_the_scale_or_the_best():
    tx = sg.reduce_on_plateau(0.9, patience=0, threshold=0.0)
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    state = tx.init(params)
    for value in (1.001, 1.002):
        _, state = tx.update(params, state, value=value)
    told = sg.metrics(state)
    np.testing.assert_allclose(told["plateau_scale"], 0.9, rtol=RTOL)
    np.testing.assert_allclose(told["plateau_best"], 1.001, rtol=RTOL)
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {
        "float32",
        "int32",
        "bool",
    }


@pytest.mark.slow
def test_a_scan_is_the_same_as_a_loop_of_steps():
    tx = sg.reduce_on_plateau(0.5, patience=1, cooldown=1, window=2)
    values = np.random.default_rng(0).normal(size=20).astype(np.float32)
    _, scanned = scales(tx, values)
    state = tx.init(PARAMS)
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    for value in values:
        _, state = step(PARAMS, state, value=jnp.asarray(value))
    chex.assert_trees_all_equal(state, scanned)


@pytest.mark.slow
def test_hyperparameters_may_be_injected_and_changed_in_the_state():
    injected = optax.inject_hyperparams(
        sg.reduce_on_plateau,
        static_args=("mode", "threshold_mode", "convention", "metric"),
    )
    tx = injected(factor=0.5, patience=2, cooldown=2, convention="torch")
    seen, state = scales(tx, np.ones(14))
    assert np.flatnonzero(np.diff(seen) < 0).tolist() == [2, 7, 12]
    state.hyperparams["factor"] = jnp.float32(0.1)
    updates = PARAMS
    for _ in range(5):
        updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS, value=1.0)
    np.testing.assert_allclose(updates["w"][0], 0.5**3 * 0.1, rtol=RTOL)


def test_settings_may_be_swept_under_vmap():
    def last(factor, patience):
        tx = sg.reduce_on_plateau(factor, patience)
        return scales_of(tx)[-1]

    def scales_of(tx):
        step = lambda state, value: tx.update(1.0, state, value=value)[::-1]
        return jax.lax.scan(step, tx.init(1.0), jnp.ones(3))[1]

    swept = jax.vmap(last)(jnp.array([0.5, 0.1, jnp.nan]), jnp.array([0, 1, 0]))
    np.testing.assert_allclose(swept, [0.25, 0.1, 1.0], rtol=RTOL)


def test_a_plateau_of_another_metric_is_not_fed_by_the_loss():
    tx = optax.chain(
        sg.reduce_on_plateau(0.5, 0),
        sg.reduce_on_plateau(0.1, 0, metric="accuracy", mode="max"),
        sg.reduce_on_plateau(0.2, 0, metric=None),
    )
    state = tx.init(PARAMS)
    for accuracy in (0.1, 0.2, 0.3):
        _, state = tx.update(PARAMS, state, value=1.0, accuracy=accuracy)
    told = sg.metrics(state)
    assert told["plateau_cuts"] == 2 and told["plateau_2_cuts"] == 0
    assert told["plateau_3_evaluations"] == 0


def test_a_step_without_the_metric_only_applies_the_scale():
    tx = sg.reduce_on_plateau(0.5, patience=0)
    step = jax.jit(tx.update)
    _, state = tx.update(PARAMS, tx.init(PARAMS), value=1.0)
    _, state = tx.update(PARAMS, state, value=1.0)
    updates, state = step(PARAMS, state)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: 0.5 * x, PARAMS))
    assert sg.metrics(state)["plateau_evaluations"] == 2


def test_a_metric_that_is_not_a_scalar_is_an_error():
    tx = sg.reduce_on_plateau()
    with pytest.raises(ValueError, match="`value` must be a real scalar"):
        tx.update(PARAMS, tx.init(PARAMS), value=jnp.ones(2))


@pytest.mark.slow
def test_inside_a_guard_the_metric_of_a_rejected_step_is_not_seen():
    tx = sg.guard(sg.reduce_on_plateau(0.5, 0), sg.skip())
    state = tx.init(PARAMS)
    bad = {"w": jnp.array([jnp.nan, 1.0])}
    step = jax.jit(tx.update)
    for grads in (PARAMS, bad, bad):
        _, state = step(grads, state, value=1.0)
    told = sg.metrics(state)
    assert told["plateau_evaluations"] == 1 and told["plateau_scale"] == 1.0


@pytest.mark.parametrize(
    "name, value",
    [
        ("factor", 1.0),
        ("factor", np.nan),
        ("patience", -1),
        ("patience", 1.5),
        ("patience", 2**40),
        ("patience", np.inf),
        ("mode", "auto"),
        ("threshold", -0.1),
        ("threshold", np.nan),
        ("threshold_mode", "relative"),
        ("cooldown", -1),
        ("cooldown", 2**31),
        ("min_scale", 1.5),
        ("start_after", -1),
        ("window", 0),
        ("convention", "jax"),
        ("metric", "not a name"),
        ("metric", 1),
    ],
)
def test_rejects_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value!r}"):
        sg.reduce_on_plateau(**{name: value})
