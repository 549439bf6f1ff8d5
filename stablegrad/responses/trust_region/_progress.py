"""Progress: whether the loss falls or rises by more than its noise explains.

Two running means of the loss forget over windows that grow with the run, so that slow
improvement late in a run is still seen.

    window = clip(t / 8, 50, 400);  far over `window` steps, near over window / 5
    error = 1.25 * spread * sqrt(5 / (2 * window)),  spread = mean of |loss - far|
    improves: far - near > error;  worsens: near - far > error

`error` is one standard deviation of `near` if losses are independent and normal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._norms import LARGEST

SHARE, SHORTEST, LONGEST = 1 / 8, 50.0, 400.0
NEARER = 5.0
DEVIATION = 1.25  # Standard deviation over mean distance, of a normal distribution.


class Progress(NamedTuple):
    """Running means of the loss; every array is float32 of rank 0, and finite."""

    far: jax.Array
    near: jax.Array
    spread: jax.Array  # Mean distance from `far`.


def init_progress() -> Progress:
    """Return the progress before the first step."""
    return Progress(*[jnp.zeros((), jnp.float32) for _ in Progress._fields])


def window(steps) -> jax.Array:
    """Return the number of steps that `far` remembers."""
    return jnp.clip(SHARE * steps.astype(jnp.float32), SHORTEST, LONGEST)


def after_loss(progress: Progress, loss, steps) -> Progress:
    """Return the progress after a step's loss, which is ignored unless finite."""
    first, length = steps == 0, window(steps)

    def mean(old, new, length):
        kept = 1 - 1 / length
        moved = jnp.where(first, new, kept * old + (1 - kept) * new)
        return jnp.where(jnp.isfinite(loss), jnp.clip(moved, -LARGEST, LARGEST), old)

    distance = jnp.where(first, 0.0, jnp.abs(loss - progress.far))
    return Progress(
        mean(progress.far, loss, length),
        mean(progress.near, loss, length / NEARER),
        mean(progress.spread, distance, length),
    )


def gain(progress: Progress, steps) -> jax.Array:
    """Return the recent fall of the loss in standard errors; above 1 it improves."""
    error = DEVIATION * progress.spread * jnp.sqrt(NEARER / (2 * window(steps)))
    fell = progress.far - progress.near
    return fell / jnp.maximum(error, 1e-37)
