"""Tests for `stablegrad.rarity`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marking import core
from helpers.thresholding import judged, limits, lognormal

import stablegrad as sg

DEFAULT, REFUSING = sg.rarity(), sg.rarity(margin=32.0)
LOSS = sg.rarity(margin=2.0, of="value")
RTOL = 1e-3  # float32 logarithms and powers of two against float64.
EDGES = np.append(np.arange(1, 73) / 3, np.arange(26, 101, 2))  # Octaves.


def oracle(signals, share, window, margin, norm, patience=4):
    """The limit that each step meets: the docstring's recurrence in float64."""
    tail, reach, level, spread = np.zeros(len(EDGES)), 0.0, 0.0, 0.0
    run, run_mean, seen, found = 0, 0.0, 0, []
    for x in signals:
        if norm:
            early = np.inf if seen < 1 else 6.0 * (seen < 2)
            early += 3.0 * (seen < 10) + 1.0 * (seen < 100)
        else:
            early = np.inf if seen < 50 else 0.0
        s = max(spread, 1e-3 * abs(level) + 1e-30)
        top = level + reach + early if norm else level + s * 2 ** (reach + early)
        if run >= patience:
            top = max(top, run_mean + 1 if norm else 2 * run_mean - level)
        found.append(margin * 2**top if norm else level + margin * (top - level))
        if not np.isfinite(x):
            continue
        y = np.log2(x) if norm else x
        r = (y - level) * (seen > 0) if norm else np.log2(max(y - level, 1e-36) / s)
        unusual = r > reach + early
        counted = seen if norm else seen - 10
        weight = max(1 / window, 1 / (max(counted, 0) + 1))
        if counted >= 0 and (run == 0 or not unusual):
            tail += weight * ((r >= EDGES) - tail)
        w = max(0.03, 1 / (seen + 1))
        bound = (np.inf if seen < 2 else 3) if norm else np.inf if seen < 10 else 8 * s
        if not norm and spread <= 0:
            bound = np.inf
        near = np.clip(y - level, -bound, bound)
        if not norm and (not unusual or run == 0):
            spread = 0.0 if seen == 0 else spread + w * (abs(near) - spread)
        if unusual and run >= max(patience, 12):
            level, run = run_mean, 0
        else:
            level, run = level + w * near, run + 1 if unusual else 0
        if unusual:
            run_mean += (y - run_mean) / max(run, 1)
        else:
            run_mean = 0.0
        reach = EDGES[np.argmax(tail <= max(share, 1.5 * weight))]
        seen += 1
    return np.array(found)


def eventful(seed):
    """Norms with an outlier, a nan, a burst, two shifts and a regular kind."""
    norms = lognormal(400, seed=seed)
    norms[60], norms[61] = 1e6, np.nan
    norms[90:95] *= 1e3
    norms[150:] *= 30
    norms[300:] /= 100
    norms[320::16] *= 50
    return norms


@pytest.mark.parametrize(
    "share, window, margin",
    core([(0.01, 256, 1), (0.05, 64, 32)], (0.01, 256, 1)),
)
def test_norm_limits_match_the_float64_oracle(share, window, margin):
    for seed in range(3):
        norms = eventful(seed)
        seen, _, _ = limits(sg.rarity(share, window=window, margin=margin), norms)
        expected = oracle(norms, share, window, margin, norm=True)
        assert np.isinf(seen[0]) and np.isinf(expected[0])
        # A residual within rounding of an edge may be counted on its other side.
        close = np.isclose(seen[1:], expected[1:], rtol=RTOL)
        assert close.mean() > 0.99


@pytest.mark.parametrize("patience", core([4, 8, 20], 8))
def test_loss_limits_match_the_float64_oracle(patience):
    rng = np.random.default_rng(0)
    losses = 3 * np.exp(-np.arange(400) / 80) - 1 + 0.1 * rng.normal(size=400)
    losses[120:122], losses[270:] = 9.0, losses[270:] + 4.0
    losses[350] = np.nan
    rule = sg.rarity(margin=2.0, patience=patience, of="value")
    seen, exceeded, _ = limits(rule, losses)
    expected = oracle(losses, 0.01, 256, 2.0, norm=False, patience=patience)
    armed = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(seen), armed)
    close = np.isclose(seen[armed], expected[armed], rtol=RTOL, atol=1e-3)
    assert close.mean() > 0.99
    assert exceeded[[120, 121, 270, 271]].all()
    lasting = exceeded[270:350]
    assert lasting[:patience].all() and lasting[: 2 * patience].sum() <= patience + 1
    assert not lasting[2 * patience :].any()


@pytest.mark.parametrize("gap", core([6, 10, 16], 10))
def test_a_loss_that_leaves_a_constant_again_and_again_is_usual(gap):
    losses = np.zeros(400)
    losses[100::gap] = np.random.default_rng(0).uniform(0.3, 1.1, losses[100::gap].size)
    losses[300:] = np.random.default_rng(1).uniform(0.1, 1.0, 100)  # Now every time.
    exceeded = limits(LOSS, losses)[1]
    assert not exceeded[:110].any() and exceeded[200:].sum() <= 2
    losses[350] = 1e4
    assert limits(LOSS, losses)[1][350]


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.5, 1.0])
def test_healthy_steps_pass_and_outliers_of_six_deviations_do_not(sigma):
    norms = lognormal(6000, sigma)
    assert limits(DEFAULT, norms)[1][500:].mean() <= 0.01
    at = np.arange(500, 6000, 200)
    norms[at] = np.exp(6 * sigma)
    assert limits(DEFAULT, norms)[1][at].all()


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2, 5, 10, 100, 1e4])
def test_a_lasting_shift_is_usual_after_a_few_steps(factor):
    norms = lognormal(1000)
    norms[600:] *= factor
    seen, exceeded, _ = limits(DEFAULT, norms)
    assert exceeded[600:640].sum() <= 12
    assert not limits(REFUSING, norms)[1][604:].any()
    norms = np.append(norms[:650], 100 * factor)
    assert seen[650] < 10 * factor and limits(DEFAULT, norms)[1][-1]


def test_a_lasting_fall_is_followed():
    norms = lognormal(760)
    norms[600:] /= 1e4
    assert limits(DEFAULT, norms)[0][-1] < 1e-3


@pytest.mark.parametrize("steps", [5, 12])
def test_a_burst_leaves_the_limit_where_it_was(steps):
    norms = lognormal(600)
    norms[500 : 500 + steps] *= 1e3
    seen, exceeded, _ = limits(DEFAULT, norms)
    assert exceeded[500:504].all()
    assert (seen[550 + steps :] < 10).all()


def test_the_unit_of_a_norm_does_not_matter():
    norms = lognormal(400)
    norms[[50, 80]] *= 40
    seen, exceeded, _ = limits(DEFAULT, norms)
    assert exceeded[[50, 80]].all()
    for unit in (1e-3, 10.0, 1e3, 1e6):
        found, again, _ = limits(DEFAULT, unit * norms)
        np.testing.assert_array_equal(again, exceeded)
        close = np.isclose(found[1:], unit * seen[1:], rtol=RTOL)
        assert close.mean() > 0.99


@pytest.mark.parametrize("factor", [3, 50, 1e6, 1e11])
def test_a_kind_of_step_that_comes_regularly_is_usual(factor):
    norms = lognormal(6000)
    norms[::16] *= factor
    shrunk = limits(DEFAULT, norms)[1]
    assert shrunk[:1000:16].sum() <= 25
    assert shrunk[1000:].mean() <= 0.01
    assert limits(REFUSING, norms)[1].sum() <= 4


def test_one_outlier_does_not_hide_the_next():
    norms = lognormal(400)
    norms[200], norms[250] = 1e3, 5.0
    assert limits(DEFAULT, norms)[1][[200, 250]].all()


def test_norms_that_wander_do_not_open_the_limit():
    norms = 10 ** (-3 * np.random.default_rng(0).random(1000))
    seen, exceeded, _ = limits(DEFAULT, norms)
    assert seen[500:].max() < 3 and exceeded.mean() < 0.02


@pytest.mark.parametrize("threshold", [DEFAULT, LOSS])
def test_the_last_digit_of_a_constant_signal_is_usual(threshold):
    signal = np.full(400, 2.0)
    signal[300:] = np.nextafter(np.float32(2), np.float32(3))
    assert not limits(threshold, signal)[1].any()


def test_the_margin_changes_the_limit_alone():
    norms = eventful(0)
    one, _, state = limits(DEFAULT, norms)
    wide, _, others = limits(REFUSING, norms)
    np.testing.assert_allclose(wide, 32 * one, rtol=1e-6)
    chex.assert_trees_all_equal(state, others)


@pytest.mark.slow
def test_groups_are_followed_each_by_itself():
    table = np.stack([eventful(0), lognormal(400, level=1e-6, seed=7)], axis=1)
    together, _, _ = limits(sg.rarity(per="leaf"), table)
    for i in range(2):
        alone, _, _ = limits(DEFAULT, table[:, i])
        np.testing.assert_allclose(together[:, i], alone, rtol=1e-6)


@pytest.mark.slow
def test_settings_may_be_swept_under_vmap():
    table = eventful(1)[:, None]

    def last(share, window, margin):
        words, _ = judged(sg.rarity(share, window=window, margin=margin), table)
        return words.limit[-1, 0]

    shares, windows, margins = [0.01, 0.1], [256, 32], [1.0, 4.0]
    swept = jax.vmap(last)(jnp.array(shares), jnp.array(windows), jnp.array(margins))
    for i, setting in enumerate(zip(shares, windows, margins, strict=True)):
        share, window, margin = setting
        alone = limits(sg.rarity(share, window=window, margin=margin), table[:, 0])
        np.testing.assert_allclose(swept[i], alone[0][-1], rtol=1e-5)


def test_extreme_signals_leave_a_finite_state():
    rng = np.random.default_rng(3)
    wild = 10.0 ** rng.uniform(-44, 38, size=500) * rng.choice([1.0, -1.0], size=500)
    for threshold, signal in ((DEFAULT, np.abs(wild)), (LOSS, wild)):
        _, _, state = limits(threshold, signal)
        chex.assert_tree_all_finite(state)


@pytest.mark.parametrize(
    "name, value", [("share", 0.0), ("share", 1.0), ("window", 1), ("margin", 0.5)]
)
def test_rejects_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value}"):
        sg.rarity(**{name: value})
