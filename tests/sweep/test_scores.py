"""Tests for the scores of a candidate over its learning rates."""

import numpy as np

from stablegrad.sweep import _scores

# Wortsman et al.'s definition on seven rates, one broken: worked out by hand.
LOSSES, INITIAL = np.array([3.2, 3, 2.9, 3, 4, 12, np.nan]), 10.0
KNOWN = 15.8 / 7
RATES = np.array([3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1])


def curve(loss, accuracy=np.nan, dead=0.0, initial=INITIAL):
    return np.broadcast_arrays(initial, loss, accuracy, dead)


def score(*curves, trivial=9.0):
    return _scores.score(RATES, trivial, curves)


def test_sensitivity_has_the_known_answer():
    seen = score(curve(LOSSES))
    np.testing.assert_allclose(seen.sensitivity.mean, KNOWN, rtol=1e-12)
    np.testing.assert_allclose(seen.sensitivity.mean, 2.2571, atol=5e-5)
    np.testing.assert_allclose(seen.normalised.mean, KNOWN / 7.1, rtol=1e-12)
    assert np.isnan(seen.sensitivity.error)


def test_best_is_the_methods_own_and_each_seeds():
    two = score(curve(LOSSES), curve(LOSSES + 1, initial=INITIAL + 1))
    np.testing.assert_allclose(two.sensitivity, (KNOWN, 0.0), atol=1e-12)
    np.testing.assert_allclose(two.best, 3.4)
    np.testing.assert_array_equal(two.broken, [0, 0, 0, 0, 0, 0, 2])


def test_standard_error_is_over_seeds():
    flat = curve(np.full(7, 2.0))
    seen = score(curve(LOSSES), flat).sensitivity
    np.testing.assert_allclose(seen, (KNOWN / 2, KNOWN / 2), rtol=1e-12)


def test_band_and_cliff_are_read_from_the_best_rate_outwards():
    near = np.array([2.9, 3.0, 2.91, 2.9, 2.92, 2.95, 3.1])
    seen = score(curve(near))
    assert seen.best_rate == RATES[0]
    np.testing.assert_allclose(seen.band, 0.0)
    np.testing.assert_allclose(seen.cliff, 0.3)
    seen = score(curve(np.array([3.1, 3.0, 2.91, 2.9, 2.92, 2.95, 2.9999])))
    np.testing.assert_allclose(seen.band, np.log10(3e-2 / 3e-3))
    assert np.isnan(seen.cliff)


def test_a_network_at_chance_is_flagged_though_its_sensitivity_is_zero():
    chance = score(curve(np.full(7, 8.95), dead=0.9))
    assert chance.sensitivity.mean == 0
    assert chance.trivial.all() and (chance.dead == 0.9).all()
    np.testing.assert_array_equal(
        score(curve(LOSSES)).trivial, [False] * 5 + [True] * 2
    )
