"""The range test on a quadratic, whose limit is known."""

import math
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg
from stablegrad.curvature._range_test import _steepest

SGD = optax.sgd(1.0)
BATCH = jnp.array([1.0, 10.0])


def quadratic(params, batch):
    return 0.5 * jnp.sum(batch * params**2)


def swept(batches=BATCH, tx=SGD, params=None, **settings):
    params = jnp.ones(2) if params is None else params
    settings = {"learning_rate": 1.0, **settings} if tx is SGD else settings
    return sg.learning_rate_range_test(
        quadratic, params, batches, tx, **{"low": 1e-4, **settings}
    )


@pytest.fixture(scope="module")
def plain():
    return swept()


def oracle(rates, smoothing=0.98):
    """The losses before each step, and their debiased average, in float64."""
    x, h = np.ones(2), np.array([1.0, 10.0])
    average, losses, smoothed = 0.0, [], []
    for i, rate in enumerate(rates):
        losses.append(0.5 * np.sum(h * x**2))
        average = smoothing * average + (1 - smoothing) * losses[-1]
        smoothed.append(average / (1 - smoothing ** (i + 1)))
        x = x - rate * h * x
    return losses, smoothed


def test_rates_are_log_spaced_and_losses_match_the_oracle(plain):
    ratios = np.diff(np.log(plain.rates))
    np.testing.assert_allclose(ratios, math.log(1e5) / 99, rtol=1e-6)
    losses, smoothed = oracle(plain.rates)
    np.testing.assert_allclose(plain.losses, losses, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(plain.smoothed, smoothed, rtol=1e-3)


def test_it_blows_up_after_the_limit_and_suggests_less(plain):
    limit = 2 / 10
    assert plain.suggestion < limit < plain.divergence < 10 * limit
    assert plain.minimum_tenth < limit
    assert plain.rates[-1] == plain.divergence  # Finite there; it ended by its size.
    assert str(plain).startswith("The loss fell fastest at 0.0")
    assert f"It blew up at {plain.divergence:.2g}." in str(plain)


def test_the_slope_is_that_over_the_logarithm_of_the_rate():
    rates = np.geomspace(1e-7, 10, 100)
    falls = 1 / (1 + np.exp(2 * np.log(rates / 1e-3)))  # Steepest at 1e-3.
    assert 0.8e-3 < _steepest(rates, falls) < 1.2e-3
    assert math.isnan(_steepest(rates, -falls))
    assert math.isnan(_steepest(rates[:15], falls[:15]))


def test_the_rate_that_the_optimizer_was_built_with_does_not_matter(plain):
    built = swept(tx=optax.sgd(0.5), learning_rate=0.5)
    np.testing.assert_allclose(built.losses, plain.losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batches", [[BATCH] * 30, (BATCH for _ in range(30))])
def test_it_ends_where_the_batches_do(batches, plain):
    found = swept(batches)
    assert found.losses == plain.losses[:30] and found.divergence == math.inf
    assert "It had not blown up at 0.00" in str(found)
    assert "The batches ran out there, after 30 of 100 rates: pass 100" in str(found)


def test_too_few_batches_for_a_suggestion_are_no_loss_that_never_fell(plain):
    found = swept([BATCH] * 8)
    assert found.losses == plain.losses[:8]
    assert str(found).startswith("There were too few steps to suggest a rate.")


def test_a_function_of_the_rate_is_taken(plain):
    np.testing.assert_array_equal(swept(tx=optax.sgd).losses, plain.losses)


def test_an_optimizer_that_does_not_tell_its_rate_is_an_error():
    with pytest.raises(ValueError, match="`tx` of `learning_rate_range_test` must te"):
        swept(tx=optax.adamw(1e-3))


def test_a_rate_in_the_optimizers_state_is_read_or_another_told_an_error(plain):
    injected = optax.inject_hyperparams(optax.sgd)(0.5)
    found = swept(tx=injected)
    np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-4, atol=1e-6)
    assert "ran out" not in str(found)
    with pytest.raises(ValueError, match="`learning_rate` .* is 0.5 by its .* got 1."):
        swept(tx=injected, learning_rate=1.0)


def test_the_users_parameters_stay_as_they_were():
    params = jnp.ones(2, jnp.bfloat16)
    swept(params=params, steps=20)
    assert params.dtype == jnp.bfloat16 and (params == 1).all()


def test_negative_losses_do_not_end_it():
    found = swept(-BATCH, high=1e-2)
    assert max(found.losses) < 0 and len(found.rates) == 100


def test_a_loss_that_only_rises_suggests_nothing():
    found = swept(tx=lambda rate: optax.sgd(-rate))
    assert math.isnan(found.suggestion) and "no rate to suggest" in str(found)


def test_a_loss_that_overflows_ends_it():
    found = swept(low=1.0, high=1e30, steps=20, blow_up=1e30)
    assert math.isfinite(found.divergence) and np.isfinite(found.losses).all()


def test_the_figure_shows_both_curves_and_the_rates(plain):
    (axes,) = plain.figure().axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    found = (plain.suggestion, plain.minimum_tenth, plain.divergence)
    rates = zip(("steepest", "minimum / 10", "blew up"), found, strict=True)
    assert labels == ["loss", "smoothed", *(f"{x}: {rate:.2g}" for x, rate in rates)]
    assert axes.get_xscale() == "log"


def test_without_matplotlib_the_figure_says_what_to_install(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install 'stablegrad\\[report\\]'"):
        plain.figure()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(low=0.0), "`low` must be finite and > 0, got 0.0"),
        (dict(high=1e-5), "`high` must be finite and > `low`, got 1e-05"),
        (dict(steps=19), "`steps` must be an integer >= 20, got 19"),
        (dict(learning_rate=-1.0), "`learning_rate` must be finite and > 0"),
        (dict(smoothing=1.0), r"`smoothing` must be in \[0, 1\)"),
        (dict(blow_up=1.0), "`blow_up` must be finite and > 1"),
        (dict(batches=[]), "`batches` must hold a batch .* got none"),
        (dict(batches=BATCH * jnp.nan), "`batches` .* got a first loss that is not"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        swept(**settings)


@pytest.mark.slow
def test_a_loss_that_stays_0_is_drawn():
    at_minimum = swept(params=jnp.zeros(2), steps=20)
    low, high = at_minimum.figure().axes[0].get_ylim()
    assert low < 0 < high
