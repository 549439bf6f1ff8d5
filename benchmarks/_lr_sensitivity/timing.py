"""Step time relative to the bare optimizer: one rate, no vmap, donated, in turn.

Under vmap a `lax.cond` runs both branches, so the cost of a method that rests on most
steps cannot be read from the runs themselves.
"""

import statistics
import time
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import jax
import optax

import stablegrad as sg

from .running import EXTRAS, gradient, inputs, train_step
from .tasks import Task

CYCLE = 8  # Steps: a multiple of the steps from probe to probe.
ROUND_SECONDS = 0.1  # Of the bare optimizer, a cycle at a time, in turn.


class Times(NamedTuple):
    """What a step costs."""

    update: float  # Over the bare step's time, through `update`.
    apply: float | None  # The same through `stablegrad.apply`, if it is a guard.
    bare_ms: float  # Milliseconds of the bare step itself.

    @property
    def least(self) -> float:
        """The ratio of the faster way."""
        return min(x for x in (self.update, self.apply) if x is not None)


def through_apply(task: Task, tx, carry, key, extras):
    """The step through `stablegrad.apply`."""
    params, state = carry
    loss, grads, given = gradient(task, params, key, extras)
    return sg.apply(tx, grads, state, params, **given), loss


class Runner:
    """A compiled step and where it has got to."""

    def __init__(
        self,
        task: Task,
        tx: optax.GradientTransformation,
        step: Callable = train_step,
        extras: tuple[str, ...] = EXTRAS,
    ):
        """Compiles, and takes the first cycle of steps."""
        _, params, keys = inputs(task, 0)
        # Donated, so no array may be there twice.
        self.carry = jax.tree.map(lambda x: x.copy(), (params, tx.init(params)))
        self.keys, self.taken = list(keys), 0
        self.step = jax.jit(
            lambda carry, key: step(task, tx, carry, key, extras)[0],
            donate_argnums=0,
        )
        self.seconds(CYCLE)

    def seconds(self, steps: int) -> float:
        """The time that so many steps take."""
        started = time.perf_counter()
        for _ in range(steps):
            key = self.keys[self.taken % len(self.keys)]
            self.carry = self.step(self.carry, key)
            self.taken += 1
        jax.block_until_ready(self.carry)
        return time.perf_counter() - started


class Clock:
    """Times the methods of one task, each in turn with the same bare optimizer."""

    def __init__(self, task: Task, rounds: int):
        """Compiles nothing yet."""
        self.task, self.rounds = task, rounds
        self.rate = float(task.rates[len(task.rates) // 3])  # Every method trains here.

    @cached_property
    def bare(self) -> Runner:
        """The optimizer alone."""
        return Runner(self.task, self.task.optimizer(self.rate))

    def times(self, tx: optax.GradientTransformation, extras) -> Times:
        """Medians over cycles, each against the bare optimizer's just before it."""
        cycles = max(1, round(ROUND_SECONDS / self.bare.seconds(CYCLE)))
        base = []

        def median_ratio(step: Callable) -> float:
            runner, ratios = Runner(self.task, tx, step, extras), []
            for _ in range(self.rounds * cycles):
                base.append(self.bare.seconds(CYCLE))
                ratios.append(runner.seconds(CYCLE) / base[-1])
            return statistics.median(ratios)

        update = median_ratio(train_step)
        guarded = isinstance(tx, sg.GuardedTransformation)
        apply = median_ratio(through_apply) if guarded else None
        return Times(update, apply, 1e3 * statistics.median(base) / CYCLE)
