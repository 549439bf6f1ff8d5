"""How an optimizer averages, seen from two steps on made-up gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ._moments import Decays, holding, second_moment

_AGREE = 1e-4  # Absolute: two readings of one decay.
_KNOWN = {"count", "mu", "nu"}  # A state with more than these has a rule of its own.


class _Shown(NamedTuple):
    b2: jax.Array  # Several readings, which agree if it is one decay.
    momentum: jax.Array  # The same.
    moves: jax.Array  # bool: whether the first step is one; it is not in a warm-up.
    drifts: jax.Array  # bool: whether a step is one when the gradient is zero again.


def decays(tx, point, momentum: float | None, b2: float | None) -> Decays:
    """Those given, and for None those that a fresh state shows.

    A moment becomes x after a gradient of ones, (1 + b) x after another, and b x if one
    of zeros follows instead. Where the two disagree it follows another rule, and
    guessing would give a wrong limit without a word: ValueError.
    """
    node = second_moment(jax.eval_shape(tx.init, point), point)
    averaged = hasattr(node, "mu")
    if momentum is not None and b2 is not None:
        return Decays(momentum, b2, averaged)
    shown = _shown(tx, point)
    if b2 is None:
        b2 = _agreed(shown.b2)
        if not b2 or not set(getattr(node, "_fields", ())) <= _KNOWN:
            raise _hidden("b2")
    if momentum is None:
        momentum = _agreed(shown.momentum)
        # What moves on has a momentum, and a mean without effect is none.
        fits = not shown.moves or bool(shown.drifts) == bool(momentum)
        if momentum is None or not fits:
            raise _hidden("momentum")
    return Decays(momentum, b2, averaged)


@functools.partial(jax.jit, static_argnames="tx")
def _shown(tx, point) -> _Shown:
    # At parameters of zero, so that no decay of them counts as a gradient.
    nothing = jax.tree.map(jnp.zeros_like, point)
    ones = jax.tree.map(jnp.ones_like, point)

    def step(grads, state):
        return tx.update(grads, state, nothing, value=jnp.zeros((), jnp.float32))

    fresh = tx.init(nothing)
    first, once = step(ones, fresh)
    _, twice = step(ones, once)
    last, rested = step(nothing, once)

    def readings(field: str, of_growth: bool) -> jax.Array:
        start, one, two, rest = (
            ravel_pytree(getattr(holding(field, state)[0], field))[0]
            for state in (fresh, once, twice, rested)
        )
        seen = [rest / one]
        if of_growth:
            seen.append((two - one) / (one - start))
        return jnp.stack([end(x) for x in seen for end in (jnp.min, jnp.max)])

    means, sums = holding("mu", fresh), holding("trace", fresh)
    if len(means) + len(sums) > 1:
        momentum = jnp.full(1, jnp.nan)
    elif means:
        momentum = readings("mu", of_growth=True)
    elif sums:  # Behind the second moment, where no gradient stays the same.
        momentum = readings("trace", of_growth=False)
    else:
        momentum = jnp.zeros(1)
    return _Shown(
        b2=readings("nu", of_growth=True),
        momentum=momentum,
        moves=jnp.any(ravel_pytree(first)[0] != 0),
        drifts=jnp.any(ravel_pytree(last)[0] != 0),
    )


def _agreed(readings) -> float | None:
    """The decay that all readings give, if they do."""
    read = [float(reading) for reading in readings]
    agree = all(0 <= x < 1 for x in read) and max(read) - min(read) <= _AGREE
    return read[0] if agree else None


def _hidden(name: str) -> ValueError:
    return ValueError(
        f"`{name}` must be given for this `tx`, whose state does not show it as Adam's "
        f"and RMSProp's do, got `{name}=None`. Only what divides by the root of an "
        "average of squares can be measured."
    )
