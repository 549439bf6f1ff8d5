"""Tests for `stablegrad.ema_ratio`."""

import chex
import numpy as np
import pytest
from helpers.marking import core
from helpers.thresholding import limits, lognormal

import stablegrad as sg

OF_50 = sg.ema_ratio(2.0, patience=50)
RTOL = 1e-4  # float32 against float64 over 300 recurrent steps.


def oracle(signals, ratio, decay, warmup, patience, norm=True):
    """The docstring's recurrence in float64: the limit each step meets."""
    past, m, run, seen_limits = [], 0.0, 0, []
    for x in signals:
        warming = len(past) < warmup
        limit = m + (ratio - 1) * abs(m)
        if warming:
            limit = 10 * limit if norm else np.inf
        seen_limits.append(np.inf if m == 0 else limit)
        if not np.isfinite(x):
            continue
        side = int(x > seen_limits[-1])
        if not warming and x < m - (1 - 1 / ratio) * abs(m):
            side = -1
        run = run + side if side * run > 0 else side
        past.append(x)
        median = np.median(past[-warmup:])
        h = max(ratio - 1, 1) * abs(m)
        if warming:
            m = median
        elif abs(run) >= patience:
            near = abs(median - m) <= 2 * (ratio - 1) * abs(median)
            m = median if near else (m + median) / 2
        else:
            w = min(max(x, m - h), m + h) if m != 0 else x
            m = decay * m + (1 - decay) * w
    return np.array(seen_limits)


@pytest.mark.parametrize("ratio", core([1.05, 2.0, 5.0], 2.0))
@pytest.mark.parametrize("warmup, patience", [(25, 50), (2, 3)])
def test_limits_match_the_float64_oracle(ratio, warmup, patience):
    norms = lognormal(300)
    norms[50], norms[51], norms[150:] = 1e8, np.nan, 40 * norms[150:]
    tx = sg.ema_ratio(ratio, decay=0.95, warmup_steps=warmup, patience=patience)
    expected = oracle(norms, ratio, 0.95, warmup, patience)
    np.testing.assert_allclose(limits(tx, norms)[0], expected, rtol=RTOL)


def test_a_negative_loss_has_a_limit_above_its_mean():
    losses = -5 + np.random.default_rng(0).normal(size=200)
    limit, exceeded, _ = limits(sg.ema_ratio(3.0, of="value"), losses)
    expected = oracle(losses, 3.0, 0.98, 25, 50, norm=False)
    np.testing.assert_allclose(limit, expected, rtol=RTOL, atol=1e-3)
    assert not exceeded.any()


@pytest.mark.parametrize("factor", [3.0, 1e6, 1e15])
def test_a_lasting_rise_is_normal_after_patience_and_a_few_steps(factor):
    norms = lognormal(300, 0.1)
    norms[100:] *= factor
    _, exceeded, _ = limits(OF_50, norms)
    assert exceeded[100]
    assert not exceeded[155:].any()


def test_a_lasting_fall_is_followed_after_patience_and_some_steps():
    norms = lognormal(300, 0.1)
    norms[100:] *= 1e-6
    limit, _, _ = limits(OF_50, norms)
    assert limit[175] < 3e-6


@pytest.mark.slow
def test_a_mean_of_zero_flags_nothing_and_recovers():
    losses = np.concatenate([np.zeros(50), lognormal(100)])
    limit, exceeded, state = limits(sg.ema_ratio(2.0, of="value"), losses)
    assert np.isinf(limit[:50]).all() and not exceeded[50]
    assert np.isfinite(limit[51:]).all()
    assert 0.5 < float(state.running_mean[0]) < 2.0


def test_one_huge_outlier_moves_the_limit_by_a_few_per_cent():
    norms = lognormal(200)
    norms[100] = 9e17
    limit, _, state = limits(sg.ema_ratio(2.0), norms)
    assert 1 < limit[101] / limit[100] < 1.05
    chex.assert_tree_all_finite(state)
