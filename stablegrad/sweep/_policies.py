"""Learning-rate policies by name, each a function of the peak rate and the steps."""

from collections.abc import Callable
from typing import Any

import optax


def _step_at(share: float, steps: int) -> int:
    return max(1, round(share * steps))


def _stairs(rates, shares, steps: int) -> optax.Schedule:
    stairs = [optax.constant_schedule(rate) for rate in rates]
    return optax.join_schedules(stairs, [_step_at(share, steps) for share in shares])


def _stairs_up(rate, steps: int) -> optax.Schedule:
    """Rise in four stairs over the first fifth of the run."""
    rates = [rate / 4 * i for i in (1, 2, 3, 4)]
    return _stairs(rates, [0.2 * i / 4 for i in (1, 2, 3)], steps)


def _warmup(rate, steps: int) -> optax.Schedule:
    """Rise linearly over the first tenth of the run."""
    return optax.linear_schedule(0.0, rate, _step_at(0.1, steps))


def _warmup_cosine(rate, steps: int) -> optax.Schedule:
    peak = _step_at(0.1, steps)
    decay = optax.cosine_decay_schedule(rate, max(1, steps - peak))
    return optax.join_schedules([_warmup(rate, steps), decay], [peak])


def _wsd(rate, steps: int) -> optax.Schedule:
    """Warm up, stay constant, and decay linearly to 0 over the last fifth."""
    length = _step_at(0.2, steps)
    decay = optax.linear_schedule(rate, 0.0, length)
    return optax.join_schedules([_warmup(rate, steps), decay], [max(1, steps - length)])


POLICIES: dict[str, Callable[[Any, int], Any]] = {
    "static": lambda rate, steps: rate,
    "warmup": _warmup,
    "stairs_up": _stairs_up,
    "stairs_down": lambda rate, steps: _stairs(
        [rate, rate / 10, rate / 100], [0.5, 0.75], steps
    ),
    "cosine": optax.cosine_decay_schedule,
    "warmup_cosine": _warmup_cosine,
    "exponential": lambda rate, steps: optax.exponential_decay(rate, steps, 0.01),
    "wsd": _wsd,
}
