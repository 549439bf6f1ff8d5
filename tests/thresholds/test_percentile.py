"""Tests for `stablegrad.percentile`."""

import chex
import numpy as np
import pytest
from helpers.marking import core
from helpers.thresholding import limits, lognormal

import stablegrad as sg

HIGH, OF_50 = sg.percentile(99.5), sg.percentile(90.0, window=50)
RTOL = 1e-5  # float32 against float64; nothing is recurrent but the bound.


def oracle(signals, q, window, warmup, patience, norm=True):
    """The docstring's rule in float64: the limit each step meets."""
    kept, raw, run, seen_limits = [], [], 0, []
    for x in signals:
        limit, middle = np.inf, np.nan
        if kept:
            limit, middle = np.percentile(kept, q), np.median(kept)
        if len(raw) < warmup:
            limit = 12 * middle if norm and kept else np.inf
        seen_limits.append(limit)
        if not np.isfinite(x):
            continue
        settled = len(raw) >= warmup
        side = int(x > limit and x > middle) - int(x < middle) if settled else 0
        run = run + side if side * run > 0 else side
        raw.append(x)
        kept = [*kept, min(x, limit + abs(limit))][-window:]
        if len(raw) == warmup:
            middle = np.median(raw)
            spread = 1.4826 * np.median(np.abs(raw - middle))
            kept = [min(x, middle + 6 * spread) for x in kept]
        if abs(run) >= patience:
            kept, run = raw[-warmup:], 0
    return np.array(seen_limits)


@pytest.mark.slow
@pytest.mark.parametrize("q", core([10.0, 50.0, 99.5], 99.5))
@pytest.mark.parametrize(
    "window, warmup, patience", core([(60, 25, 50), (9, 4, 6)], (60, 25, 50))
)
def test_limits_match_the_float64_oracle(q, window, warmup, patience):
    norms = lognormal(400)
    norms[60], norms[61], norms[200:300] = 1e6, np.nan, 30 * norms[200:300]
    threshold = sg.percentile(q, window=window, warmup_steps=warmup, patience=patience)
    expected = oracle(norms, q, window, warmup, patience)
    np.testing.assert_allclose(limits(threshold, norms)[0], expected, rtol=RTOL)


@pytest.mark.slow
def test_limits_of_a_loss_match_the_float64_oracle():
    losses = np.random.default_rng(0).normal(size=300) - 1.0
    threshold = sg.percentile(95.0, window=50, of="value")
    expected = oracle(losses, 95.0, 50, 25, 50, norm=False)
    np.testing.assert_allclose(limits(threshold, losses)[0], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.5])
def test_flags_about_the_stated_share_of_healthy_steps(sigma):
    _, exceeded, _ = limits(HIGH, lognormal(5000, sigma))
    assert 0.002 < exceeded.mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2.0, 10.0, 1e6, 1e15])
def test_a_lasting_rise_is_normal_after_patience(factor):
    norms = lognormal(1400)
    norms[1200:] *= factor
    _, exceeded, _ = limits(HIGH, norms)
    assert exceeded[1200] or factor < 3
    assert exceeded[1252:].mean() < 0.1  # The window is young.


@pytest.mark.parametrize("factor", [0.5, 0.1, 1e-6])
def test_a_lasting_fall_is_followed_after_patience(factor):
    norms = lognormal(1400)
    norms[1200:] *= factor
    limit, _, _ = limits(HIGH, norms)
    assert limit[1260] < 3 * factor


def test_one_huge_outlier_hides_no_other():
    norms = lognormal(600)
    norms[100], norms[150] = 9e17, 5.0
    limit, exceeded, state = limits(HIGH, norms)
    assert exceeded[100] and exceeded[150]
    assert limit[101] / limit[100] < 2.01
    chex.assert_tree_all_finite(state)


def test_an_outlier_in_the_very_first_step_leaves_the_limit_right():
    norms = lognormal(120)
    norms[0] = 30.0
    limit, _, _ = limits(HIGH, norms)
    assert limit[24] > 10 and limit[25] < 4


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_value_changes_nothing_but_its_own_step(bad):
    norms = lognormal(120)
    clean, _, _ = limits(OF_50, norms)
    faulty, exceeded, _ = limits(OF_50, np.insert(norms, 60, bad)[:-1])
    np.testing.assert_array_equal(np.delete(faulty, 60), clean[:-1])
    assert not exceeded[60]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"q": 101.0}, r"`q` must be in \[0, 100\]"),
        ({"q": np.nan}, r"`q` must be in \[0, 100\]"),
        ({"q": 9.0, "window": 10}, "`window` must be an integer >= 25"),
        ({"q": 9.0, "patience": 10}, "`patience` must be an integer >= 25"),
    ],
)
def test_rejects_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        sg.percentile(**settings)
