"""The stable limits against float64 runs of each optimizer on a quadratic."""

import math

import pytest

from stablegrad.curvature._sharpness import stable_limit

CURVATURE, STEPS = 10.0, 2000
# Optimizer: settings of `stable_limit`, and the published limit times the curvature.
TABLE = {
    "GD": (dict(), 2.0),
    "heavy ball": (dict(momentum=0.9), 3.8),
    "Nesterov": (dict(momentum=0.9, nesterov=True), 3.8 / 2.8),
    "frozen Adam": (dict(momentum=0.9, averaged=True), 38.0),
    "frozen Adam, 0.95": (dict(momentum=0.95, averaged=True), 78.0),
    "frozen NAdam": (dict(momentum=0.9, averaged=True, nesterov=True), 38 / 2.8),
}
every = pytest.mark.parametrize("name", TABLE)


def last_over_first(rate, momentum=0.0, nesterov=False, averaged=False, decay=0.0):
    """Runs the optimizer's own recurrence on 0.5 * CURVATURE * x^2."""
    x, m = 1.0, 0.0
    for _ in range(STEPS):
        g = CURVATURE * x * (1 - momentum if averaged else 1)
        m = momentum * m + g
        step = g + momentum * m if nesterov else m
        x -= rate * (step + decay * x)
        if abs(x) > 1e100:
            return math.inf
    return abs(x)


@every
def test_limits_are_those_of_the_table(name):
    settings, expected = TABLE[name]
    assert stable_limit(CURVATURE, **settings) * CURVATURE == pytest.approx(expected)


@every
@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_just_below_the_limit_contracts_and_just_above_grows(name, decay):
    settings, _ = TABLE[name]
    limit = stable_limit(CURVATURE, **settings, weight_decay=decay)
    assert last_over_first(0.99 * limit, **settings, decay=decay) < 0.1
    assert last_over_first(1.01 * limit, **settings, decay=decay) > 10


def test_adamw_has_the_published_limit():
    # (1 + b)(2 - c) / (1 - b) at c = 0.1: c is the rate times the weight decay.
    rate = stable_limit(1.0, 0.9, averaged=True, weight_decay=0.1 / 36.1)
    assert rate == pytest.approx(36.1)


@pytest.mark.parametrize("curvature", [0.0, -1.0])
def test_nothing_limits_a_rate_without_curvature(curvature):
    assert stable_limit(curvature, 0.9) == math.inf
