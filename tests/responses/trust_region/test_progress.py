"""Tests for the trend of the loss: against its own definition, and its statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad.responses.trust_region import _progress


@jax.jit
def gains(losses):
    """The gain after each of many losses, and the last means."""

    def step(carry, loss):
        progress, steps = carry
        progress = _progress.after_loss(progress, loss, steps)
        return (progress, steps + 1), _progress.gain(progress, steps + 1)

    start = (_progress.init_progress(), jnp.zeros((), jnp.int32))
    (last, _), found = jax.lax.scan(step, start, losses)
    return found, last


def run(losses):
    found, last = jax.vmap(gains)(jnp.atleast_2d(jnp.float32(losses)))
    return np.asarray(found), last


def test_the_means_are_those_of_float64_over_windows_that_grow():
    losses = 2 + np.random.default_rng(0).normal(size=5000)
    found, last = run(losses)
    far = near = np.float64(np.float32(losses[0]))
    spread = 0.0
    for t in range(1, 5000):
        loss = np.float64(np.float32(losses[t]))
        share = 1 / min(max(t / 8, 50), 400)
        spread += share * (abs(loss - far) - spread)
        far, near = far + share * (loss - far), near + 5 * share * (loss - near)
    np.testing.assert_allclose(
        [last.far[0], last.near[0], last.spread[0]], [far, near, spread], rtol=1e-3
    )
    error = 1.25 * spread * np.sqrt(5 / 800)
    np.testing.assert_allclose(found[0, -1], (far - near) / error, rtol=0.02, atol=0.02)


def test_noise_alone_has_a_gain_of_standard_deviation_one():
    losses = 2 + np.random.default_rng(1).normal(size=(200, 2000))
    found, _ = run(losses)
    # 0.9: `far` shares part of what `near` averages.
    assert 0.75 < found[:, 500::100].std() < 1.05
    assert abs(found[:, 500::100].mean()) < 0.1


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_a_loss_that_falls_by_half_in_a_thousand_steps_is_seen_to_improve(noise):
    t = np.arange(3000)
    rng = np.random.default_rng(2)
    losses = 0.5 ** (t / 1000) * (1 + noise * rng.normal(size=(50, 3000)))
    found, _ = run(losses)
    late = found[:, 2000:]
    assert (late > 1).mean() > (0.99 if noise < 0.3 else 0.7)
    rising, _ = run(2 - losses)
    assert (rising[:, 2000:] < -1).mean() > (0.99 if noise < 0.3 else 0.7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_the_means_stay_finite_and_one_bad_loss_is_forgotten(bad):
    losses = np.ones((1, 4000))
    losses[0, 7] = bad
    _, last = run(losses)
    assert np.isfinite([last.far[0], last.near[0], last.spread[0]]).all()
    if not np.isfinite(bad):
        assert last == run(np.ones((1, 4000)))[1]
