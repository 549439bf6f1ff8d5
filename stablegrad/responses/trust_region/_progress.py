"""Progress: how fast the loss falls, beside what steps gain on their own batch.

A step that gains on its own batch fits its noise as well. The loss of later batches
tells how much of that gain is real: `window = max(t / 8, 20)` steps after t steps, and

    far over `window` steps, near over half of them,  spread = mean of |loss - far|
    D = (far - near) / (window / 2)              fall of the loss in a step
    G = mean over probes of L(theta) - L(theta + d)      gain on the own batch
    error = spread / sqrt(window) / (window / 2)         deviation of D by noise
    balance = (D - 0.05 G+) / (|D| + 0.05 G+ + error),  G+ = max(G, 0)

`balance` lies in (-1, 1). It is near 1 while the loss falls, near 0 while noise hides
what the loss does, and near -1 where less than a twentieth of the gains is real: there
steps are too long for the noise.

A loss further than 4 spreads from `near` has jumped: with the data, or in one batch. It
moves `far` and `near` as one, and is neither progress nor its opposite.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._norms import LARGEST

SHARE, SHORTEST = 1 / 8, 20.0  # Of all steps that `far` remembers; and at least.
JUMP = 4.0  # Spreads from `near` beyond which a loss has jumped.
REAL = 0.05  # Share of the gains on own batches that the loss must really lose.


class Progress(NamedTuple):
    """Running means; every array is float32 of rank 0, and finite."""

    far: jax.Array
    near: jax.Array
    spread: jax.Array  # Mean distance of the loss from `far`.
    gain: jax.Array  # G; below 0 where steps lose.


def init_progress() -> Progress:
    """Return the progress before the first step."""
    return Progress(*[jnp.zeros((), jnp.float32) for _ in Progress._fields])


def window(steps) -> jax.Array:
    """Return the number of steps that `far` remembers."""
    return jnp.maximum(SHARE * steps.astype(jnp.float32), SHORTEST)


def after_loss(progress: Progress, loss, steps) -> Progress:
    """Return the progress after a step's loss, which is ignored unless finite."""
    mean = lambda old, new, length: _mean(old, new, length, steps)
    length = window(steps)
    distance = jnp.where(steps == 0, 0.0, jnp.abs(loss - progress.far))
    jump = loss - progress.near
    jumps = jnp.isfinite(loss) & (jnp.abs(jump) > JUMP * progress.spread)
    moved = lambda x: jnp.where(jumps, jnp.clip(x + jump, -LARGEST, LARGEST), x)
    return progress._replace(
        far=mean(moved(progress.far), loss, length),
        near=mean(moved(progress.near), loss, length / 2),
        spread=mean(progress.spread, distance, length),
    )


def after_gain(progress: Progress, gain, probes, steps, every) -> Progress:
    """Return the progress after a probe that saw a fall of the loss by `gain`."""
    length = jnp.maximum(window(steps) / every, 1.0)
    return progress._replace(gain=_mean(progress.gain, gain, length, probes))


def balance(progress: Progress, steps) -> jax.Array:
    """Return the balance of real progress and gains on own batches, in (-1, 1)."""
    lag = window(steps) / 2
    fall = (progress.far - progress.near) / lag
    error = progress.spread / jnp.sqrt(window(steps)) / lag
    asked = REAL * jnp.maximum(progress.gain, 0.0)
    return (fall - asked) / jnp.maximum(jnp.abs(fall) + asked + error, 1e-37)


def _mean(old, new, length, count):
    weight = 1 / jnp.minimum(length, count.astype(jnp.float32) + 1)
    moved = jnp.clip(old + weight * (new - old), -LARGEST, LARGEST)
    return jnp.where(jnp.isfinite(new), moved, old)
