"""Tests for `stablegrad.limit_direction`."""

import chex
import numpy as np
import pytest
from helpers.clipping import run
from helpers.marking import core

import stablegrad as sg

DEFAULT = sg.limit_direction()


def oracle(flat, least, decay, warmup):
    """The docstring's rule in float64."""
    flat = np.asarray(flat, np.float64)
    mean, out = np.zeros(flat.shape[1]), flat.copy()
    for t, g in enumerate(flat):
        size = np.linalg.norm(g)
        cosine = g @ mean / (size * np.linalg.norm(mean)) if mean.any() else 1.0
        if t >= warmup and cosine < least and np.linalg.norm(mean) >= 0.5:
            u = mean / np.linalg.norm(mean)
            across = g - (g @ u) * u
            along = least * np.linalg.norm(across) / np.sqrt(1 - least**2)
            turned = across + along * u
            out[t] = turned * min(1.0, size / np.linalg.norm(turned))
        mean = decay * mean + (1 - decay) * g / size
    return out


def turning(steps=200, seed=0):
    rng = np.random.default_rng(seed)
    flat = rng.normal(size=11) + 0.2 * rng.normal(size=(steps, 11))
    flat[50] *= -3.0
    flat[120:] *= -1.0  # A lasting turn.
    return flat.astype(np.float32)


@pytest.mark.parametrize("least", core([-0.9, -0.5, 0.0, 0.5], -0.5))
def test_gradients_match_the_float64_oracle(least):
    flat = turning()
    out, state = run(sg.limit_direction(least, warmup_steps=10), flat)
    expected = oracle(flat, least, 0.9, 10)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    sizes = np.linalg.norm(out, axis=1)
    assert (sizes <= np.linalg.norm(flat, axis=1) * (1 + 1e-5)).all()
    turned = np.any(np.abs(expected - flat) > 1e-6, axis=1).sum()
    assert turned >= 2
    assert sg.metrics(state)["limit_direction_clipped_steps"] == turned


def test_a_lasting_turn_is_the_new_direction_within_ten_steps():
    flat = turning()
    out, _ = run(DEFAULT, flat)
    assert np.any(out[120] != flat[120])
    np.testing.assert_allclose(out[131:], flat[131:], rtol=1e-6)


def test_independent_gradients_of_many_elements_are_left_alone():
    flat = np.random.default_rng(0).normal(size=(500, 11)).astype(np.float32)
    out, _ = run(sg.limit_direction(-0.9), flat)
    assert np.mean(np.any(out != flat, axis=1)) < 0.01


@pytest.mark.parametrize("size", [1e17, 1e12, 1e-12, 1e-17])
def test_no_size_bends_the_mean(size):
    flat = turning()
    clean, _ = run(DEFAULT, flat)
    flat[60] *= size
    out, state = run(DEFAULT, flat)
    np.testing.assert_allclose(out[61:], clean[61:], rtol=1e-4, atol=1e-6)
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("size, dropped", [(1e20, 1), (1e30, 1), (1e-20, 0)])
def test_a_norm_out_of_range_teaches_nothing(size, dropped):
    flat = turning()
    clean, _ = run(DEFAULT, flat)
    faulty = np.insert(flat, 60, size * flat[60], axis=0)[:-1]
    out, state = run(DEFAULT, faulty)
    np.testing.assert_array_equal(out[60], 0.0 if dropped else faulty[60])
    np.testing.assert_allclose(np.delete(out, 60, axis=0), clean[:-1], rtol=1e-6)
    assert sg.metrics(state)["limit_direction_dropped_steps"] == dropped
    chex.assert_tree_all_finite(state)


def test_a_nan_becomes_zeros_and_teaches_nothing():
    flat = turning()
    clean, _ = run(DEFAULT, flat)
    faulty = np.insert(flat, 100, np.nan, axis=0)[:-1]  # One program for both.
    out, state = run(DEFAULT, faulty)
    assert (out[100] == 0).all()
    np.testing.assert_allclose(np.delete(out, 100, axis=0), clean[:-1], rtol=1e-6)
    assert sg.metrics(state)["limit_direction_dropped_steps"] == 1


@pytest.mark.parametrize("least", [-1.0, 1.0, np.nan])
def test_rejects_a_cosine_out_of_range(least):
    with pytest.raises(ValueError, match=r"`min_cosine` must be in \(-1, 1\)"):
        sg.limit_direction(least)
