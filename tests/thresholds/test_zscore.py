"""Tests for `stablegrad.zscore`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marking import core
from helpers.thresholding import judged, limits, lognormal

import stablegrad as sg

DEFAULT, OF_50 = sg.zscore(2.5), sg.zscore(2.5, patience=50)
LOSS = sg.zscore(6.0, of="value")

RTOL = 2e-4  # float32 logarithms and exponentials against float64, 400 recurrent steps.


class Oracle:
    """The docstring's recurrence on one scale, in float64."""

    def __init__(self, z, decay, warmup, floor, patience, log):
        self.z, self.decay, self.warmup, self.floor = z, decay, warmup, floor
        self.patience, self.log = patience, log
        self.past, self.m, self.s, self.run = [], 0.0, 0.0, 0

    def floored(self, spread, center):
        return max(spread, self.floor * (1.0 if self.log else abs(center)))

    def limit(self):
        y = self.m + self.z * self.floored(self.s, self.m)
        return np.exp(y) if self.log else y

    def learn(self, x, exceeded):
        y = np.log(max(x, 1e-30)) if self.log else x
        m, s_star, z = self.m, self.floored(self.s, self.m), self.z
        warming = len(self.past) < self.warmup
        below = not warming and y < m - z * s_star
        side = 1 if exceeded else -1 if below else 0
        self.run = self.run + side if side * self.run > 0 else side
        self.past.append(y)
        last = np.array(self.past[-self.warmup :])
        median = np.median(last)
        deviation = 1.4826 * np.median(np.abs(last - median))
        if warming:
            self.m, self.s = median, deviation
        elif abs(self.run) >= self.patience:
            near = abs(median - m) <= 2 * z * self.floored(deviation, median)
            self.m, self.s = (median if near else (m + median) / 2), deviation
        else:
            r = min(max(y - m, -2.5 * s_star), 2.5 * s_star)
            self.m = m + (1 - self.decay) * r
            grown = np.sqrt(self.decay * (s_star**2 + 1.06 * (1 - self.decay) * r**2))
            self.s = s_star if below else grown


def oracle(signals, *settings, norm):
    """The limit that each step meets."""
    log, linear = Oracle(*settings, log=True), Oracle(*settings, log=False)
    positive, seen_limits = True, []
    for x in signals:
        limit = log.limit()
        if not norm:
            limit = max(limit, linear.limit()) if positive else linear.limit()
        if len(log.past) < log.warmup:
            early = np.exp(log.m + log.z * max(log.s, 1.0))
            limit = early if norm and log.past else np.inf
        seen_limits.append(limit)
        if np.isfinite(x):
            positive = positive and x > 0
            log.learn(x, x > limit)
            linear.learn(x, x > limit)
    return np.array(seen_limits)


@pytest.mark.parametrize("warmup, patience", core([(25, 50), (4, 7), (3, 3)], (25, 50)))
def test_norm_limits_match_the_float64_oracle(warmup, patience):
    norms = lognormal(400)
    norms[60] = 1e6  # One outlier,
    norms[61] = np.nan  # one that was not finite,
    norms[200:280] *= 30  # a lasting shift, and back.
    tx = sg.zscore(2.5, decay=0.95, warmup_steps=warmup, patience=patience)
    seen, _, _ = limits(tx, norms)
    expected = oracle(norms, 2.5, 0.95, warmup, 0.05, patience, norm=True)
    np.testing.assert_allclose(seen, expected, rtol=RTOL)


LOSSES = {
    "around zero": np.random.default_rng(1).normal(size=300) - 1.0,
    "positive": 3.0 + 0.2 * np.random.default_rng(2).normal(size=300),
    "small and heavy-tailed": lognormal(300, 1.5, level=0.01, seed=3),
}


@pytest.mark.parametrize("name", core(LOSSES, "around zero", "positive"))
def test_loss_limits_match_the_float64_oracle(name):
    losses = LOSSES[name].copy()
    losses[100] = 40.0
    losses[150:] += 25.0
    tx = sg.zscore(6.0, of="value", decay=0.97, spread_floor=0.01, patience=30)
    seen, _, _ = limits(tx, losses)
    expected = oracle(losses, 6.0, 0.97, 25, 0.01, 30, norm=False)
    np.testing.assert_allclose(seen, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_heavy_tail_of_small_losses_is_not_flagged():
    # One misread image in a small batch: 100 times the median, and healthy.
    losses = lognormal(20_000, 1.5, level=0.01)
    assert limits(LOSS, losses)[1].mean() < 1e-3


@pytest.mark.slow
def test_a_jump_of_a_loss_is_flagged_wherever_its_zero_is():
    noise = 0.1 * np.random.default_rng(0).normal(size=200)
    for level in (-2.0, 0.0, 2.0):
        losses = level + noise
        losses[150] += 1.5
        exceeded = limits(LOSS, losses)[1]
        assert exceeded[150] and exceeded.sum() == 1


@pytest.mark.slow
@pytest.mark.parametrize("sigma", core([0.05, 0.2, 0.5], 0.2))
def test_flags_about_the_stated_share_of_healthy_steps(sigma):
    _, exceeded, _ = limits(DEFAULT, lognormal(20_000, sigma))
    assert 0.003 < exceeded.mean() < 0.01  # 0.6 % of a normal law is above 2.5.


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2.0, 10.0, 1e6, 1e15])
@pytest.mark.parametrize("sigma", [0.02, 0.2])
def test_a_lasting_shift_is_normal_after_patience_and_twelve_steps(factor, sigma):
    norms = lognormal(300, sigma)
    norms[100:] *= factor
    _, exceeded, _ = limits(OF_50, norms)
    assert exceeded[100]
    assert exceeded[162:].mean() < 0.03


@pytest.mark.parametrize("factor", [0.5, 0.2, 0.1, 0.01, 1e-6])
def test_a_fall_of_the_level_is_followed_and_never_flagged(factor):
    norms = lognormal(400)
    norms[100:] *= factor
    limit, exceeded, _ = limits(OF_50, norms)
    assert exceeded[100:].mean() < 0.03
    assert limit[162] < 4 * factor


def test_alternating_outliers_are_not_refused_for_ever():
    # They never come twice in a row, so only the growing spread can admit them.
    norms = lognormal(600, 0.05)
    norms[100::2] *= 20
    _, exceeded, _ = limits(DEFAULT, norms)
    assert exceeded[100:110].any()
    assert exceeded[400:].mean() < 0.05


@pytest.mark.parametrize("huge", [1e3, 1e12, 9e17])
def test_one_huge_outlier_hides_no_other(huge):
    norms = lognormal(200)
    norms[100], norms[150] = huge, 3.0  # The second is 5.5 sigma out.
    limit, exceeded, _ = limits(DEFAULT, norms)
    assert exceeded[100] and exceeded[150]
    assert limit[101] / limit[100] < 1.05


@pytest.mark.parametrize("wrong", [9e17, 1e-19, 30.0])
def test_an_outlier_in_the_very_first_step_leaves_the_limit_right(wrong):
    norms = lognormal(100)
    norms[0] = wrong
    limit, _, _ = limits(DEFAULT, norms)
    assert np.isinf(limit[0]) and (limit[3:25] > 10).all()
    assert 1.2 < limit[25] < 3.0


@pytest.mark.slow
def test_a_constant_signal_does_not_flag_its_last_digit():
    norms = 1 + 1e-6 * np.random.default_rng(0).normal(size=300)
    assert not limits(DEFAULT, norms)[1].any()
    assert not limits(sg.zscore(2.5, of="value"), norms)[1].any()
    assert not limits(sg.zscore(2.5, of="value"), np.zeros(300))[1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 10, 60])
def test_a_nonfinite_value_changes_nothing_but_its_own_step(bad, at):
    norms = lognormal(120)
    clean, _, _ = limits(DEFAULT, norms)
    faulty, exceeded, state = limits(DEFAULT, np.insert(norms, at, bad)[:-1])
    np.testing.assert_array_equal(np.delete(faulty, at), clean[:-1])
    assert not exceeded[at]  # It is reported as non-finite, not as an outlier.
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("every", core([2, 8, 10], 8))
@pytest.mark.parametrize(
    "threshold",
    [DEFAULT, sg.ema_ratio(2.0), sg.window_zscore(6.0, window=16)],
    ids=lambda threshold: threshold.name,
)
def test_norms_of_exactly_zero_teach_nothing(threshold, every):
    # Between the updates of `optax.MultiSteps`, or of a leaf that is rarely used.
    norms = lognormal(100)
    dense, sparse = np.zeros((2, 1000))
    dense[:100], sparse[: 100 * every : every] = norms, norms
    expected, flags, _ = limits(threshold, dense)
    found, sparse_flags, _ = limits(threshold, sparse)
    at = slice(None, 100 * every, every)
    np.testing.assert_array_equal(found[at], expected[:100])
    np.testing.assert_array_equal(sparse_flags[at], flags[:100])
    assert not np.delete(sparse_flags, at).any()


@pytest.mark.slow
def test_float64_settings_do_not_widen_the_state(x64):
    settings = {"decay": np.float64(0.9), "spread_floor": np.float64(0.05)}
    for threshold in (
        sg.zscore(np.float64(2.5), **settings),
        sg.ema_ratio(np.float64(2.0), decay=np.float64(0.9)),
        sg.window_zscore(np.float64(6.0), spread_floor=np.float64(0.1)),
    ):
        limit, _, _ = limits(threshold, lognormal(100))
        assert limit.dtype == np.float32


def test_groups_learn_independently():
    table = np.stack([lognormal(200), lognormal(200, level=1e4, seed=1)], axis=1)
    table[150, 0] = 1e4
    together, exceeded, _ = limits(sg.zscore(2.5, per="leaf"), table)
    alone, _, _ = limits(DEFAULT, table[:, 1])
    np.testing.assert_allclose(together[:, 1], alone, rtol=1e-6)
    assert exceeded[150, 0] and not exceeded[150, 1]


@pytest.mark.slow
def test_the_level_and_decay_may_be_traced():
    norms = lognormal(60)
    table = jnp.asarray(norms, jnp.float32)[:, None]

    def last_limit(z, decay):
        words, _ = judged(sg.zscore(z, decay=decay), table)
        return words.limit[-1, 0]

    swept = jax.jit(jax.vmap(last_limit))(jnp.array([2.0, 3.0]), jnp.array([0.9, 0.99]))
    for found, (z, decay) in zip(swept, [(2.0, 0.9), (3.0, 0.99)], strict=True):
        expected = limits(sg.zscore(z, decay=decay), norms)[0][-1]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_signals_at_both_ends_of_float32_do_not_overflow_the_statistics():
    tx = sg.zscore(4.0, of="value", warmup_steps=4, patience=4)
    _, _, state = limits(tx, [3e38, -3e38] * 40)
    chex.assert_tree_all_finite(state)


@pytest.mark.slow
def test_the_larger_of_both_limits_holds_for_a_positive_loss():
    # At this seed the linear limit ends 1.3 times above the logarithmic one.
    rng = np.random.default_rng(29)
    noise = np.exp(rng.uniform(0.2, 3) * rng.standard_normal(22))
    losses = noise * np.exp(-np.arange(22) * 0.1 * rng.random())
    tx = sg.zscore(4.0, of="value", warmup_steps=5, patience=10)
    limit, _, _ = limits(tx, np.append(losses, losses[-1]))
    _, _, state = limits(tx, losses)
    (log, linear), (log_spread, linear_spread) = state.center[0], state.spread[0]
    exponent = log + 4 * max(log_spread, 0.05)
    straight = linear + 4 * linear_spread
    assert straight > 1.2 * np.exp(exponent)
    np.testing.assert_allclose(limit[-1], straight, rtol=1e-5)
