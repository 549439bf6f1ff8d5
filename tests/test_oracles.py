"""The published numbers of each method, reproduced by its restatement."""

import numpy as np
import pytest
from helpers import oracles

RTOL = 1e-9  # The same float64 formula, written in another order.
ROUNDED = 5e-3  # The published value has three significant digits.


def lognormal(sigma, steps, seed=0):
    return np.random.default_rng(seed).lognormal(0.0, sigma, steps)


def clipped_share(factors):
    return np.mean(factors < 1)


def test_autoclip_at_the_tenth_percentile_clips_nine_steps_in_ten():
    factors = oracles.autoclip(lognormal(0.2, 3000), 10)
    assert factors[0] == pytest.approx(1, abs=1e-5)
    assert clipped_share(factors) == pytest.approx(0.894, abs=0.02)


def test_autoclip_never_forgets_a_nan():
    factors = oracles.autoclip([1.0, 2.0, np.nan, 1.0, 1.0], 10)
    assert np.isnan(factors).tolist() == [False, False, True, True, True]


def test_autoclip_interpolates_in_a_history_with_the_current_norm():
    factors = oracles.autoclip([1.0, 3.0], 50)
    assert factors[1] == pytest.approx(2 / (3 + 1e-6), rel=RTOL)


def test_autoclip_scales_to_the_running_minimum_at_zero_and_never_at_a_hundred():
    norms = [3.0, 1.0, 2.0]
    np.testing.assert_allclose(oracles.autoclip(norms, 0), [1, 1, 0.5], rtol=1e-5)
    np.testing.assert_allclose(
        oracles.autoclip(norms, 100), [1, 1, 1], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("mode", "coefficient", "mean", "var"),
    [
        ("zscore", 1.500001 / 3, 1.01500003, 0.249557),
        ("percentile", 2.0 / 3, 1.03, 0.270727),
    ],
)
def test_zclip_gives_the_golden_step(mode, coefficient, mean, var):
    start = dict(mean=1.0, var=0.25, z=2.0, mode=mode)
    factors, means, variances = oracles.zclip([3.0], max_norm=None, **start)
    assert factors[0] == pytest.approx(coefficient, rel=1e-6)
    assert means[0] == pytest.approx(mean, abs=1e-8)
    assert variances[0] == pytest.approx(var, abs=1e-6)

    # The static limit clips harder and leaves the statistics alone.
    limited = oracles.zclip([3.0], max_norm=1.0, **start)
    assert limited[0][0] == pytest.approx(1 / (3 + 1e-6), rel=RTOL)
    assert limited[1][0] == means[0]
    assert limited[2][0] == variances[0]


def test_zclip_warms_up_on_raw_norms_and_clips_statically_meanwhile():
    norms = np.arange(1.0, 27.0)
    factors, means, variances = oracles.zclip(norms, max_norm=2.0)
    np.testing.assert_allclose(factors[:25], np.minimum(1, 2 / norms[:25]), rtol=1e-6)
    assert np.isnan(means[:24]).all()
    assert (means[24], variances[24]) == (13.0, 52.0)


@pytest.mark.parametrize(
    ("rule", "shares"),
    [
        ({}, (0.014, 0.027, 0.057)),
        ({"option": "mean"}, (0.020, 0.043, 0.133)),
        ({"mode": "percentile"}, (0.012, 0.022, 0.044)),
    ],
)
def test_zclip_clips_ordinary_norms_at_the_known_rates(rule, shares):
    for sigma, share in zip((0.05, 0.2, 0.5), shares, strict=True):
        factors = oracles.zclip(lognormal(sigma, 6000), max_norm=None, **rule)[0]
        # The mean option locks in for random stretches, so its share wanders.
        assert clipped_share(factors) == pytest.approx(share, abs=0.004, rel=0.25)


@pytest.mark.parametrize("jump", [3, 10])
@pytest.mark.parametrize("rule", [{}, {"option": "mean"}])
def test_zclip_locks_in_when_the_level_triples(rule, jump):
    norms = lognormal(0.2, 3000)
    norms[500:] *= jump
    factors, means, variances = oracles.zclip(norms, max_norm=None, **rule)
    assert (factors[500:] < 1).all()
    assert means[-1] < 1.5
    assert variances[-1] < 1e-20


@pytest.mark.parametrize(("jump", "steps"), [(3, 17), (10, 47)])
def test_zclip_in_percentile_mode_recovers(jump, steps):
    norms = lognormal(0.2, 3000)
    norms[500:] *= jump
    factors, means, _ = oracles.zclip(norms, max_norm=None, mode="percentile")
    assert np.argmax(factors[500:] == 1) <= steps + 5
    assert clipped_share(factors[600:]) < 0.05
    assert means[-1] == pytest.approx(jump, rel=0.2)


def test_zclip_can_leave_spikes_out_of_its_statistics():
    start = dict(mean=1.0, var=0.25, skip_update_on_spike=True)
    _, means, variances = oracles.zclip([3.0, 1.1], **start)
    assert (means[0], variances[0]) == (1.0, 0.25)
    assert means[1] == pytest.approx(1.003)


def test_zclip_lets_a_nan_through_and_stays_off():
    norms = np.array([1.0, np.nan, 1000.0])
    factors, means, _ = oracles.zclip(norms, max_norm=None, mean=1.0, var=0.01)
    assert factors.tolist() == [1, 1, 1]
    assert np.isnan(means[1:]).all()
    assert oracles.zclip(norms, mean=1.0, var=0.01)[0][2] == 1 / (1000 + 1e-6)


def test_zclip_survives_an_inf():
    factors, means, variances = oracles.zclip([np.inf], mean=1.0, var=0.01)
    assert factors[0] == 0
    assert (means[0], variances[0]) == pytest.approx((1.0, 0.0097))


@pytest.mark.parametrize(
    ("sigma", "share", "level"),
    [(0.05, 0.19, 0.99), (0.2, 0.63, 0.91), (0.5, 0.80, 0.64)],
)
def test_adagc_clips_a_large_share_of_ordinary_norms(sigma, share, level):
    norms = lognormal(sigma, 12000)[:, None]
    factors, gammas = oracles.adagc(norms)
    assert clipped_share(factors[2000:]) == pytest.approx(share, abs=0.02)
    assert np.mean(gammas[2000:]) == pytest.approx(level, abs=0.02)


def test_adagc_needs_thousands_of_steps_to_follow_a_tenfold_level():
    norms = np.ones((4200, 1))
    norms[200:] *= 10
    factors, gammas = oracles.adagc(norms)
    assert np.argmax(gammas >= 5) - 200 == pytest.approx(1600, rel=0.01)
    assert np.argmax(factors[200:] >= 1) == pytest.approx(2304, rel=0.03)


def test_adagc_warms_up_on_clipped_norms():
    norms = np.array([[3.0, 4.0], [6.0, 8.0], [0.3, 0.4]])
    factors, gammas = oracles.adagc(norms)
    np.testing.assert_allclose(factors, [[0.2] * 2, [0.1] * 2, [1.0] * 2])
    np.testing.assert_allclose(gammas, [[0.6, 0.8], [0.6, 0.8], [0.3, 0.4]])


def test_adagc_warms_up_for_99_steps():
    norms = np.full((102, 1), 0.5)
    norms[98:] = 0.8  # Less than the absolute limit, more than the relative one.
    assert np.argmax(oracles.adagc(norms)[0] < 1) == 99


@pytest.mark.parametrize(
    ("param", "grad", "expected"),
    [([3.0, 4.0], [7.0, 24.0], [0.7, 2.4]), ([0.0], [1.0], [0.0])],
)
def test_agc_gives_the_golden_values_of_composer(param, grad, expected):
    # Composer has no floor under the parameter norm.
    out = oracles.agc(grad, param, None, clipping=0.5, eps=0.0)
    np.testing.assert_allclose(out, expected, rtol=RTOL)


def test_agc_clips_each_unit_by_itself_and_floors_the_parameter_norm():
    grad, param = np.ones((4, 2)), np.array([[100.0, 0.0]] * 4)
    out = oracles.agc(grad, param, 0)
    np.testing.assert_allclose(out[:, 0], 1.0)
    assert np.linalg.norm(out[:, 1]) == pytest.approx(0.01 * 1e-3)


@pytest.mark.parametrize(("k", "deviations"), [(20, 9.95), (100, 21.8), (499, 44.4)])
def test_spam_never_reaches_its_nominal_threshold(k, deviations):
    grads = np.ones((1000, 1))
    grads[499 + k] = 1e9
    clipped = oracles.spam(grads)[1]
    assert clipped[499 + k, 0] == pytest.approx(deviations, rel=ROUNDED)


def test_spam_leaves_twenty_steps_unprotected_after_a_reset():
    grads = np.ones((1000, 1))
    grads[499:530] = 1e3 ** np.arange(31)[:, None]
    clipped = oracles.spam(grads)[1]
    assert np.argmax(clipped[499:530] < grads[499:530]) == 20


def test_spam_makes_the_first_update_after_a_reset_too_big():
    updates = oracles.spam(np.ones((6000, 1)), warmup=0)[0][:, 0]
    assert updates[0] == pytest.approx(-1, rel=1e-4)
    assert updates[5999] == pytest.approx(-3.16, rel=ROUNDED)
    # The cosine ramp of the defaults starts at a hundredth and hides it.
    ramped = oracles.spam(np.ones((6000, 1)))[0][:, 0]
    assert ramped[5999] == pytest.approx(0.01 * updates[5999], rel=RTOL)


def adaclip_limit_after_reset(k, resets=10):
    """The limit at debiasing step `k` after a reset, largest element 1 before it."""
    grads = np.ones((1000 * resets + k - 1, 1))
    grads[-1] = 1e6
    clipped = oracles.stable_spam_adaclip(grads)[-1, 0]
    return clipped - 0.001 * 1e6 / (1 - 0.999**k)


@pytest.mark.parametrize(
    ("k", "inflation"), [(2, 500), (10, 100), (100, 10.5), (500, 2.5), (999, 1.58)]
)
def test_stable_spam_inflates_its_limit_after_a_reset(k, inflation):
    assert adaclip_limit_after_reset(k) == pytest.approx(inflation, rel=0.02)


def test_stable_spam_inverts_the_order_of_elements():
    steps, theta = 500, 0.999
    # The past maximum that puts the limit at 1 when the current maximum is 10.
    past = (1 - theta**steps - (1 - theta) * 10) / (theta - theta**steps)
    grads = np.full((steps, 3), past)
    grads[-1] = [10.0, 1.01, 0.99]
    clipped = oracles.stable_spam_adaclip(grads)
    np.testing.assert_allclose(clipped[-1], [1.0, 0.101, 0.99], rtol=RTOL)


@pytest.mark.parametrize(("b2", "bound"), [(0.95, 4.47), (0.99, 10), (0.999, 31.6)])
def test_stable_adamw_bounds_its_response_to_a_spike(b2, bound):
    grads = np.full((8000, 1), 1e-3)
    grads[-1] = 1e6
    updates, rms = oracles.stable_adamw(grads, b2=b2, eps=1e-12)
    assert rms[0] == 1
    assert rms[-1] == pytest.approx(bound, rel=ROUNDED)
    assert rms[-1] <= 1 / np.sqrt(1 - b2) * (1 + RTOL)
    # m is (1 - b1) g and sqrt(v) is g / rms, so the two cancel.
    assert updates[-1, 0] == pytest.approx(-0.1, rel=1e-6)


SKIPS = [oracles.olmo_skip, oracles.levanter_skip, oracles.maxtext_skip]


def losses_and_norms(steps=600):
    rng = np.random.default_rng(0)
    return rng.normal(3.0, 0.05, steps), rng.normal(1.0, 0.05, steps)


@pytest.mark.parametrize("skip", SKIPS)
def test_one_nan_loss_skips_129_steps(skip):
    losses, norms = losses_and_norms()
    losses[300] = np.nan
    assert np.flatnonzero(skip(losses, norms)).tolist() == list(range(300, 429))


@pytest.mark.parametrize("skip", SKIPS)
def test_a_large_outlier_hides_a_smaller_one_for_a_window(skip):
    losses, norms = losses_and_norms()
    losses[300], losses[350] = 10.0, 5.0
    assert np.flatnonzero(skip(losses, norms)).tolist() == [300]
    losses[300] = 3.0
    assert np.flatnonzero(skip(losses, norms)).tolist() == [350]


@pytest.mark.parametrize("skip", SKIPS)
def test_a_burst_and_a_level_shift_are_skipped_at_their_start_only(skip):
    losses, norms = losses_and_norms()
    burst, shift = norms.copy(), norms.copy()
    burst[300:310] += 5.0
    shift[300:] += 0.5
    assert np.flatnonzero(skip(losses, burst)).tolist() == [300, 301, 302, 303]
    assert np.flatnonzero(skip(None, shift)).tolist() == [300, 301, 302]


@pytest.mark.parametrize(("skip", "first"), list(zip(SKIPS, (63, 64, 63), strict=True)))
def test_skipping_starts_when_half_a_window_is_known(skip, first):
    norms = np.ones(128)
    norms[:10] += 1e-6 * np.arange(10)
    norms[first - 1] = 1e9
    assert not skip(None, norms).any()
    norms[first - 1 : first + 1] = 1.0, 1e9
    assert np.flatnonzero(skip(None, norms)).tolist() == [first]


def test_a_constant_history_skips_any_increase_unless_the_deviation_has_a_floor():
    norms = np.ones(100)
    norms[80] += 1e-6
    assert oracles.olmo_skip(None, norms)[80]
    assert not oracles.levanter_skip(None, norms)[80]


@pytest.mark.parametrize(
    ("skip", "std"), list(zip(SKIPS, (2**0.5, 1, 2**0.5), strict=True))
)
def test_the_deviation_is_that_of_its_source(skip, std):
    norms = np.array([-1.0, 1.0, 2.999 * std])
    assert not skip(None, norms, window=4, sigma=3.0)[2]
    norms[2] = 3.001 * std
    assert skip(None, norms, window=4, sigma=3.0)[2]


@pytest.mark.parametrize("skip", SKIPS)
def test_a_short_window_skips_a_loss_of_a_billion(skip):
    losses = [1.0, 1.1, 0.9, 1e9]
    assert skip(losses, np.ones(4), window=4, sigma=1.0)[3]


def test_axlearn_drops_for_ever_after_a_level_shift():
    norms = np.random.default_rng(0).normal(1.0, 0.1, 3000)
    norms[1000:] *= 5
    skip, means, _ = oracles.axlearn_drop(norms, kind="stddev")
    assert not skip[:1000].any()
    assert skip[1000:].sum() == 2000
    assert means[-1] == means[999]


def test_axlearn_drops_norms_above_twenty_until_a_smaller_one_comes():
    assert oracles.axlearn_drop(np.full(500, 25.0))[0].all()
    skip, means, squares = oracles.axlearn_drop([25.0, 20.0, np.nan, 19.0, 25.0])
    assert skip.tolist() == [True, True, True, False, False]
    assert (means[3], squares[3]) == (19.0, 361.0)


def test_a_global_norm_spreads_a_nan():
    factors = oracles.global_norm_clip([0.5, 1.0, 4.0, np.inf, np.nan], 1.0)
    np.testing.assert_array_equal(factors, [1, 1, 0.25, 0, np.nan])
