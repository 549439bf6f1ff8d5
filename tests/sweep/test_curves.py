"""Tests for what a curve of training losses tells."""

import numpy as np
import pytest

from stablegrad.sweep._curves import divergence, spikes


def oracle(losses, window=1000, least=32, sigmas=7):
    """The definition, window by window."""
    losses = np.asarray(losses, np.float64)
    count = 0
    for i in range(least, len(losses)):
        before = losses[max(0, i - window) : i]
        spread = before.std()
        count += losses[i] > before.mean() + sigmas * spread + 1e-6 * abs(losses[i])
    return count


def test_gaussian_noise_has_no_spikes_and_one_planted_is_found():
    losses = np.random.default_rng(0).normal(5.0, 1.0, 9000)
    assert spikes(losses) == 0
    losses[4000] = 5.0 + 10.0
    assert spikes(losses) == 1
    for sigmas, count in ((6.0, 1), (8.0, 2)):
        losses[7000] = 5.0 + sigmas
        assert spikes(losses) == count


@pytest.mark.parametrize("level", [0.0, -3.0, 1e6])
def test_spikes_are_those_of_the_definition_at_any_level(level):
    rng = np.random.default_rng(1)
    losses = level + rng.normal(size=3000) + np.linspace(5, 0, 3000)
    losses[rng.integers(100, 3000, 12)] += 40.0
    assert spikes(losses) == oracle(losses) > 5


def test_constant_losses_and_short_runs_have_none():
    assert spikes(np.full(500, 0.1)) == spikes(np.arange(20.0)) == 0
    assert spikes(np.concatenate([np.full(500, 0.1), [0.2]])) == 1


def test_losses_that_are_not_finite_are_no_spikes_and_hide_none():
    losses = np.random.default_rng(2).normal(5.0, 1.0, 500)
    losses[100], losses[200], losses[300] = np.nan, np.inf, 30.0
    assert spikes(losses) == 1


@pytest.mark.parametrize(
    "losses, step",
    [
        (np.linspace(2, 1, 50), -1),
        ([2.0, 1.0, np.inf], 2),
        ([2.0, 1.0, np.nan, np.nan], 2),
        ([np.nan, np.nan], 0),
        # What a guard has survived is no divergence either.
        ([2.0, 1.0, np.nan, 1.0], -1),
        ([np.inf, 2.0, np.nan, 1.0], -1),
        ([2.0, 1.0, np.nan, *[9.0] * 9], 3),
        (np.linspace(1, 2, 50), 1),
        (np.full(50, 2.0), -1),
        # A spike that is survived is no divergence.
        ([2.0, *[1.0] * 20, 50.0, *[1.0] * 60], -1),
    ],
)
def test_a_run_is_lost_where_it_never_comes_back(losses, step):
    assert divergence(losses) == step


def test_the_step_of_divergence_is_the_start_of_the_last_stretch():
    losses = np.concatenate([[2.0], np.full(50, 1.0), np.full(30, 100.0)])
    assert divergence(losses) == 51
