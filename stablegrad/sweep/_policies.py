"""Learning-rate policies by name: what becomes of the rate over a run.

static        the rate, from first to last
warmup        rises from 0 in a line over the first tenth
stairs_up     a quarter, a half, three quarters, all: four stairs in the first fifth
stairs_down   a tenth of it after half the run, a hundredth after three quarters
cosine        half a cosine to 0
warmup_cosine both
exponential   falls by the same factor each step, to a hundredth at the end
wsd           rises over the first tenth, stays, falls in a line to 0 in the last fifth
"""

from collections.abc import Callable
from typing import Any

import optax

WARM_UP, STAIRS, COOL_DOWN = 0.1, 0.2, 0.2  # Shares of the run.
LAST = 0.01  # Of the rate, where the exponential ends.


def _steps(share: float, steps: int) -> int:
    return max(1, round(share * steps))


def _stairs_up(rate, steps: int) -> optax.Schedule:
    quarter = rate / 4
    stairs = [optax.constant_schedule(quarter * height) for height in range(1, 5)]
    edges = [_steps(STAIRS * i / 4, steps) for i in range(1, 4)]
    return optax.join_schedules(stairs, edges)


def _stairs_down(rate, steps: int) -> optax.Schedule:
    heights = [rate, rate / 10, rate / 100]
    edges = [_steps(0.5, steps), _steps(0.75, steps)]
    stairs = [optax.constant_schedule(height) for height in heights]
    return optax.join_schedules(stairs, edges)


def _warmup(rate, steps: int) -> optax.Schedule:
    return optax.linear_schedule(0.0, rate, _steps(WARM_UP, steps))


def _warmup_cosine(rate, steps: int) -> optax.Schedule:
    rise = _steps(WARM_UP, steps)
    fall = optax.cosine_decay_schedule(rate, max(1, steps - rise))
    return optax.join_schedules([_warmup(rate, steps), fall], [rise])


def _exponential(rate, steps: int) -> optax.Schedule:
    return optax.exponential_decay(rate, steps, LAST)


def _wsd(rate, steps: int) -> optax.Schedule:
    fall = _steps(COOL_DOWN, steps)
    down = optax.linear_schedule(rate, 0.0, fall)
    return optax.join_schedules([_warmup(rate, steps), down], [max(1, steps - fall)])


POLICIES: dict[str, Callable[[Any, int], Any]] = {
    "static": lambda rate, steps: rate,
    "warmup": _warmup,
    "stairs_up": _stairs_up,
    "stairs_down": _stairs_down,
    "cosine": optax.cosine_decay_schedule,
    "warmup_cosine": _warmup_cosine,
    "exponential": _exponential,
    "wsd": _wsd,
}
