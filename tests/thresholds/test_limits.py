"""Tests for `stablegrad.fixed` and `stablegrad.nonfinite`, and for all arguments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.thresholding import limits, lognormal, said

import stablegrad as sg
from stablegrad.granularity._groups import independent
from stablegrad.thresholds._base import Scope, learn, unobserved


def test_fixed_flags_what_is_above_its_limit_and_not_what_is_at_it():
    _, exceeded, state = limits(sg.fixed(2.0), [1.0, 2.0, 2.0001, 0.0])
    np.testing.assert_array_equal(exceeded, [False, False, True, False])
    assert state == ()


@pytest.mark.parametrize(
    "of, bad",  # A norm is never negative.
    [
        ("grad_norm", [np.nan, np.inf]),
        ("update_norm", [np.inf]),
        ("value", [np.nan, np.inf, -np.inf]),
    ],
    ids=["grad_norm", "update_norm", "value"],
)
@pytest.mark.parametrize(
    "make, setting",
    [
        (sg.nonfinite, None),
        (sg.zscore, 3.0),
        pytest.param(sg.fixed, 2.0, marks=pytest.mark.slow),
        pytest.param(sg.ema_ratio, 2.0, marks=pytest.mark.slow),
    ],
)
def test_no_threshold_calls_a_nonfinite_signal_normal(make, setting, of, bad):
    threshold = make(of=of) if setting is None else make(setting, of=of)
    words, _ = said(threshold, np.resize(bad, 20))
    assert words.nonfinite.all()


@pytest.mark.parametrize(
    "of, signals",
    [("grad_norm", [0.0, 9e17]), ("value", [0.0, 3e38, -3e38])],
)
def test_nonfinite_calls_every_finite_signal_normal(of, signals):
    words, _ = said(sg.nonfinite(of=of), signals)
    assert not words.exceeded.any() and not words.nonfinite.any()


THRESHOLDS = [
    sg.fixed(2.0),
    sg.nonfinite(),
    sg.zscore(2.5),
    sg.ema_ratio(2.0),
    sg.window_zscore(6.0),
    sg.percentile(90.0, window=50),
]


@pytest.mark.slow
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: t.name)
def test_a_norm_of_1e18_counts_as_nonfinite_and_teaches_nothing(threshold):
    norms = np.append(lognormal(60), [1e18, 3e38] * 10)
    words, state = said(threshold, norms)
    _, clean = said(threshold, norms[:60])
    assert words.nonfinite[60:].all() and not words.nonfinite[:60].any()
    assert not words.exceeded[60:].any() and not words.teaches[60:].any()
    chex.assert_trees_all_equal(state, clean)


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: t.name)
def test_a_step_without_the_signal_is_normal_and_teaches_nothing(threshold):
    _, state = said(threshold, lognormal(60))
    grouping = independent(1)

    @jax.jit
    def step(state):
        limit = threshold.limit(state, Scope(grouping))
        word = unobserved(threshold, limit, grouping)
        return word, learn(threshold, state, word)

    word, after = step(state)
    assert not word.exceeded.any() and not word.nonfinite.any()
    chex.assert_trees_all_equal(after, state)


ARGUMENTS = {
    "fixed": (sg.fixed, {"limit": 1.0}, {"limit": [-1.0, np.nan, np.inf, "a", None]}),
    "zscore": (
        sg.zscore,
        {"z": 2.5},
        {
            "z": [0.0, -1.0, np.nan],
            "decay": [0.5, 1.0, np.nan],
            "warmup_steps": [2, 10.0, True],
            "spread_floor": [0.0, np.nan],
            "patience": [24, 50.0],
        },
    ),
    "ema_ratio": (
        sg.ema_ratio,
        {"ratio": 2.0},
        {
            "ratio": [1.0, np.nan],
            "decay": [1.0, -0.1],
            "warmup_steps": [0],
            "patience": [24],
        },
    ),
    "window_zscore": (
        sg.window_zscore,
        {"sigma": 6.0},
        {"sigma": [0.0, np.nan], "window": [3, 8.0], "spread_floor": [0.0]},
    ),
}
WRONG = [
    (name, argument, value)
    for name, (_, _, wrong) in ARGUMENTS.items()
    for argument, values in wrong.items()
    for value in values
]


@pytest.mark.parametrize("name, argument, value", WRONG)
def test_arguments_out_of_range_are_named_with_what_must_hold(name, argument, value):
    factory, good, _ = ARGUMENTS[name]
    with pytest.raises(ValueError, match=f"`{argument}` must be .*, got"):
        factory(**{**good, argument: value})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_unknown_signals_and_granularities_are_named(name):
    factory, good, _ = ARGUMENTS[name]
    with pytest.raises(ValueError, match="`of` must be one of .*, got 'gradnorm'"):
        factory(**good, of="gradnorm")
    with pytest.raises(ValueError, match="`per` must be one of .*, got 'layer'"):
        factory(**good, per="layer")
    with pytest.raises(ValueError, match="`per` must be 'global' for of='value'"):
        factory(**good, of="value", per="leaf")


def test_a_negative_limit_is_allowed_where_the_signal_can_be_negative():
    assert sg.fixed(-1.0, of="value").of == "value"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["max_grad_norm", "value", "my_value"])
def test_a_function_named_like_a_standard_signal_is_not_taken_for_it(name):
    of = lambda updates, params, extra: extra["own"]
    of.__name__ = name
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(1.0, of=of)))
    params = jnp.ones(2)
    _, state = tx.update(params, tx.init(params), params, own=jnp.float32(2.0))
    assert "skip_fixed_signal_limit" in sg.metrics(state)
    (event,) = sg.events(state)
    assert event.signal == "skip_fixed_signal" and event.value == 2
