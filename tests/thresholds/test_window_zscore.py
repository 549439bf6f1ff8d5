"""Tests for `stablegrad.window_zscore`."""

import chex
import numpy as np
import pytest
from helpers.thresholding import limits, lognormal

import stablegrad as sg

DEFAULT, OF_64 = sg.window_zscore(6.0), sg.window_zscore(6.0, window=64)
RTOL = 1e-4  # float32 logarithms against float64.


def oracle(signals, sigma, window, floor, log):
    """The docstring's rule in float64: the limit each step meets."""
    past, seen_limits = [], []
    for x in signals:
        limit = np.inf
        if len(past) >= window // 2:
            y = np.array(past[-window:])
            center = np.median(y)
            spread = 1.4826 * np.median(np.abs(y - center))
            limit = center + sigma * max(spread, floor * (1.0 if log else abs(center)))
            limit = np.exp(limit) if log else limit
        elif past and log:
            y = np.array(past)
            spread = 1.4826 * np.median(np.abs(y - np.median(y)))
            limit = np.exp(np.median(y) + sigma * max(spread, 1.0))
        seen_limits.append(limit)
        if np.isfinite(x):
            past.append(np.log(x) if log else x)
    return np.array(seen_limits)


@pytest.mark.parametrize("window", [4, 5, 64])
def test_norm_limits_match_the_float64_oracle(window):
    norms = lognormal(200)
    norms[50], norms[51], norms[120:] = 1e9, np.inf, 7 * norms[120:]
    seen, _, _ = limits(sg.window_zscore(6.0, window=window), norms)
    expected = oracle(norms, 6.0, window, 0.05, log=True)
    np.testing.assert_allclose(seen, expected, rtol=RTOL)


def test_loss_limits_match_the_float64_oracle():
    losses = np.random.default_rng(0).normal(size=200)
    losses[77], losses[78] = 1e10, np.nan
    seen, _, _ = limits(sg.window_zscore(4.0, window=32, of="value"), losses)
    expected = oracle(losses, 4.0, 32, 0.05, log=False)
    np.testing.assert_allclose(seen, expected, rtol=RTOL, atol=1e-5)


@pytest.mark.slow
def test_one_huge_outlier_hides_no_other_within_the_window():
    norms = lognormal(300)
    norms[200], norms[250] = 9e17, 8.0
    _, exceeded, state = limits(DEFAULT, norms)
    assert exceeded[200] and exceeded[250]
    chex.assert_tree_all_finite(state)


def test_one_nan_does_not_flag_the_steps_after_it():
    norms = lognormal(300)
    norms[200] = np.nan
    _, exceeded, _ = limits(DEFAULT, norms)
    assert not exceeded.any()


@pytest.mark.parametrize("factor", [5.0, 1e15])
def test_a_lasting_shift_is_normal_once_it_fills_half_the_window(factor):
    norms = lognormal(400)
    norms[200:] *= factor
    _, exceeded, _ = limits(OF_64, norms)
    assert exceeded[200]
    assert not exceeded[200 + 33 :].any()


@pytest.mark.slow
def test_a_constant_signal_does_not_flag_its_last_digit():
    norms = 1 + 1e-6 * np.random.default_rng(0).normal(size=300)
    assert not limits(sg.window_zscore(3.0), norms)[1].any()
