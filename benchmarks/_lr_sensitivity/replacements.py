"""Optimizers that stand in the place of a task's own, at the same rates.

Adam's b2 and weight decay and the warm-up stay the task's own.
"""

import numpy as np
import optax
from optax import contrib

from .tasks import WARM_UP, Task


def is_text(task: Task) -> bool:
    """Whether it is task A."""
    return task.name.startswith("A")


def is_adam(task: Task) -> bool:
    """Whether the task's own optimizer is Adam."""
    return "momentum" not in task.name


def _adam(task: Task) -> dict[str, float]:
    """What the task's own Adam is set to."""
    if is_text(task):
        return {"b2": 0.95, "weight_decay": 1e-4}
    return {"b2": 0.999, "weight_decay": 0.0}


def _schedule(task: Task, rate):
    """The task's own schedule at another rate."""
    if is_text(task):
        return optax.warmup_constant_schedule(0.0, rate, WARM_UP)
    return rate


def _multiplier(task: Task, rate):
    """The task's grid, moved so that its geometric middle is 1."""
    return rate / float(np.sqrt(task.rates[0] * task.rates[-1]))


def prodigy(task: Task, rate):
    """Adam with a multiplier in place of a rate."""
    adam = _adam(task)
    return contrib.prodigy(
        _schedule(task, _multiplier(task, rate)),
        betas=(0.9, adam["b2"]),
        weight_decay=adam["weight_decay"],
        # As its authors advise where there is a warm-up.
        safeguard_warmup=is_text(task),
    )


def dowg(task: Task, rate):
    """SGD with a multiplier in place of a rate."""
    return contrib.dowg(_schedule(task, _multiplier(task, rate)))


def momo(task: Task, rate):
    """Momentum, or Adam, with the rate as upper bound."""
    if not is_adam(task):
        return contrib.momo(rate, beta=0.9)
    return contrib.momo_adam(_schedule(task, rate), **_adam(task))


def schedule_free(task: Task, rate):
    """Averaging in place of momentum."""
    if not is_adam(task):
        return contrib.schedule_free_sgd(rate, warmup_steps=WARM_UP)
    return contrib.schedule_free_adamw(rate, warmup_steps=WARM_UP, **_adam(task))
