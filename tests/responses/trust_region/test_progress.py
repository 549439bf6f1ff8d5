"""Tests for the progress of the loss: its definition, and its statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad.responses.trust_region import _progress

EVERY = 4


@jax.jit
def balances(losses, gains):
    """The balance after each of many losses, and the last means.

    Every fourth step is probed, and sees its own `gains`.
    """

    def step(carry, seen):
        progress, steps, probes = carry
        loss, gain = seen
        probed = steps % EVERY == 0
        after = _progress.after_gain(progress, gain, probes, steps, EVERY)
        progress = jax.tree.map(lambda a, b: jnp.where(probed, a, b), after, progress)
        progress = _progress.after_loss(progress, loss, steps)
        carry = progress, steps + 1, probes + probed
        return carry, _progress.balance(progress, steps + 1)

    none = jnp.zeros((), jnp.int32)
    start = (_progress.init_progress(), none, none)
    (last, *_), found = jax.lax.scan(step, start, (losses, gains))
    return found, last


def run(losses, gains=0.0):
    losses = jnp.atleast_2d(jnp.float32(losses))
    gains = jnp.broadcast_to(jnp.float32(gains), losses.shape)
    found, last = jax.vmap(balances)(losses, gains)
    return np.asarray(found), last


def oracle(losses, gains):
    """What the docstring says, in float64."""
    far = near = spread = mean = 0.0
    found, jumps = [], 0
    for t, (loss, gain) in enumerate(zip(losses, gains, strict=True)):
        window = max(t / 8, 20)
        if t % EVERY == 0:
            weight = 1 / min(max(window / EVERY, 1), t // EVERY + 1)
            mean += weight * (gain - mean)
        weight = 1 / min(window, t + 1)
        distance = abs(loss - far) if t else 0.0
        if abs(loss - near) > 4 * spread:
            jumps += 1
            far, near = far + loss - near, loss
        spread += weight * (distance - spread)
        far += weight * (loss - far)
        near += (loss - near) / min(window / 2, t + 1)
        window = max((t + 1) / 8, 20)
        fall = (far - near) / (window / 2)
        error = spread / np.sqrt(window) / (window / 2)
        asked = 0.05 * max(mean, 0)
        below = abs(fall) + asked + error
        found.append((fall - asked) / below if below else 0.0)
    return np.array(found), (far, near, spread, mean), jumps


def test_means_and_balance_are_those_of_the_docstring_in_float64():
    rng = np.random.default_rng(0)
    t = np.arange(4000)
    losses = 2 + np.exp(-t / 800) + rng.normal(size=4000) + 30 * (t > 2500)
    gains = 0.02 + 0.05 * rng.normal(size=4000)
    losses, gains = (np.float64(np.float32(x)) for x in (losses, gains))
    found, last = run(losses, gains)
    expected, means, jumps = oracle(losses, gains)
    assert 2 <= jumps < 30  # The first losses, and where the data change.
    np.testing.assert_allclose([x[0] for x in last], means, rtol=1e-3)
    np.testing.assert_allclose(found[0], expected, atol=2e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_noise_alone_has_a_balance_near_0_on_average_and_always_within_1(scale):
    noise = np.random.default_rng(1).normal(size=(200, 2000))
    found, _ = run(scale * (2 + noise))
    assert (np.abs(found) < 1).all()
    assert abs(found[:, 200:].mean()) < 0.01
    assert np.abs(found[:, 200:].mean(axis=1)).mean() < 0.2


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_a_steady_fall_has_a_balance_near_1(noise):
    t = np.arange(3000)
    rng = np.random.default_rng(2)
    losses = 0.5 ** (t / 300) * (1 + noise * rng.normal(size=(50, 3000)))
    falling, _ = run(losses)
    assert (np.abs(falling) <= 1).all()
    assert falling[:, 500:].mean() > 0.8 and falling[:, 500:].min() > 0.7
    rising, _ = run(2 - losses)
    assert rising[:, 500:].mean() < -0.8


def test_a_jump_of_the_loss_is_neither_progress_nor_its_opposite():
    noise = 0.01 * np.random.default_rng(4).normal(size=(50, 2000))
    usual, _ = run(1 + noise)
    for jump in (5, -5):
        found, _ = run(1 + noise + jump * (np.arange(2000) >= 1000))
        # The first difference of the losses of a new task is not that of its noise.
        assert np.abs(found[:, 1000:].mean()) < 0.2
        np.testing.assert_array_equal(found[:, :1000], usual[:, :1000])
    # One that goes on falling is progress at once.
    t = np.maximum(np.arange(2000) - 1000, 0)
    found, _ = run(1 + noise + 5 * (t > 0) * 0.5 ** (t / 200))
    assert found[:, 1100:1400].mean() > 0.5


def test_gains_on_own_batches_that_are_not_real_have_a_balance_near_minus_1():
    noise = 0.01 * np.random.default_rng(3).normal(size=(50, 2000))
    found, _ = run(1 + noise, gains=0.1)
    assert found[:, 500:].mean() < -0.9
    # Of gains that are real to one part in ten, more than a twentieth is.
    found, _ = run(20 + noise - 0.01 * np.arange(2000), gains=0.1)
    assert found[:, 500:].mean() > 0
    # Steps that lose on their own batch ask for nothing.
    np.testing.assert_array_equal(run(noise, gains=-0.1)[0], run(noise)[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_the_means_stay_finite_and_one_bad_loss_or_gain_is_forgotten(bad):
    losses, gains = np.ones((1, 4000)), np.zeros((1, 4000))
    losses[0, 7], gains[0, 8] = bad, -bad
    found, last = run(losses, gains)
    assert np.isfinite(last).all() and (np.abs(found) <= 1).all()
    if not np.isfinite(bad):
        assert last == run(np.ones((1, 4000)))[1]
