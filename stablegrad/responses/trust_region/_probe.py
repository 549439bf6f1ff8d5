"""A probe: the loss along a step d, compared with what the gradient promises.

With s = g . d, the promise, and a in (0, 1] the part of the step that is probed:

    excess(a) = L(theta + a d) - L(theta) - a s;    r(a) = excess(a) / (a |s|)

To second order excess(a) = a^2 d^T H d / 2, so r is proportional to a: 0 as promised,
1/2 at the minimum of the line, 1 where nothing is gained. 1 / r is the critical
multiple of the step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _trees
from ..._leaf_sums import leaf_dots
from ..._mapped_axes import LOCAL, MappedAxes, varying_like_next
from ..._norms import LARGEST
from ..._scales import scale_leaves, uniform
from ...thresholds._signals import scalar_signal

TRIES = 8  # Maximum number of looks at one step, each nearer than the last.
NEARER = (0.01, 0.5)  # Smallest and largest factor on the part of the next look.
BLIND = 0.1  # The factor if r is not finite.
SAME, ALIKE = 0.05, 3  # Tolerance on r, and equal looks in a row, for a mismatch.
ROUNDING = 16  # Smallest change of a loss that is seen, in units in the last place.

OFFSET = 0.01  # Smallest difference from the loss, relative to an alarming rise.

KINDS = ("forward", "hvp")


class Attempt(NamedTuple):
    """The step that is about to be taken, for a response that looks ahead."""

    gradient: Any  # The incoming gradient.
    step: Callable[[], Any]  # Returns the change of the parameters.
    params: Any
    length: jax.Array  # float32, (): L2 norm of `step`.
    loss: jax.Array  # float32, (): at `params`.
    loss_fn: Callable[[Any], jax.Array]  # params -> loss, on the same batch.
    resolution: float = 2.0**-23  # The relative unit in the last place of the loss.
    axes: MappedAxes = LOCAL  # The axes over which gradient and step are sharded.


class Look(NamedTuple):
    """The findings along a step; rank-0 arrays."""

    part: jax.Array  # float32 in (0, 1]: a, the part of the step that was accepted.
    excess: jax.Array  # float32: excess(a).
    slope: jax.Array  # float32: a s.
    known: jax.Array  # bool: whether both are finite, and more than rounding.
    blind: jax.Array  # bool: whether the promise is within the loss's rounding error.
    accepted: jax.Array  # bool: whether that part may be taken.
    mismatch: jax.Array  # bool: gradient, loss or direction do not fit each other.
    looks: jax.Array  # int32: forward passes, 1 unless shortened.


class Search(NamedTuple):
    """Where a search for a part of the step stands; rank 0."""

    part: jax.Array  # float32
    excess: jax.Array  # float32: at this part.
    looks: jax.Array  # int32: so far.
    alike: jax.Array  # int32: looks in a row with the same r.
    accepted: jax.Array  # bool: whether this part may be taken.
    offset: jax.Array  # bool: whether the function does not repeat the loss.


def ratio(excess, slope) -> jax.Array:
    """Return r, or inf where the step does not descend or the loss is not finite."""
    descends = (slope < 0) & jnp.isfinite(excess)
    r = excess / jnp.where(descends, jnp.maximum(-slope, 1e-37), 1.0)
    return jnp.where(descends, jnp.clip(r, -LARGEST, LARGEST), jnp.inf)


def slope_along(attempt: Attempt, scale) -> jax.Array:
    """Return g . d for d = scale * step, in float32; complex leaves count as pairs."""
    gradients = _trees.inexact_leaves(attempt.gradient)
    sums = leaf_dots(gradients, list(_taken(attempt, scale)))
    return jnp.sum(attempt.axes.totals(sums, gradients))


def _taken(attempt: Attempt, scale):
    """Return the change by `scale` times the step, after the rounding of parameters."""

    def change(param, step):
        step = scale.astype(step.dtype) * step
        if jnp.finfo(param.dtype).bits >= 32:
            return step
        moved = (param + step).astype(param.dtype)
        return moved.astype(jnp.float32) - param.astype(jnp.float32)

    params, steps = _inexact(attempt)
    return map(change, params, steps)


def look(
    attempt: Attempt,
    kind: str,
    scale,
    rise,
    accept,
    aim,
    is_early=False,
    is_first=False,
) -> Look:
    """Look along `scale` times the step, and nearer until it may be taken.

    A part may be taken if the loss stays finite, rises by at most `rise` and, where the
    step descends, if r is at most `accept`. Otherwise it is shortened to where r would
    be `aim`. A gradient that is c times the loss's own gives r = 1 - 1/c at any length,
    which is a mismatch. If an early step may not be taken whole, the next look is at
    the parameters themselves. If half of the change is found there, the function does
    not repeat the loss: an offset. Later steps are not tested for it, since a loss may
    have fallen to its rounding errors. A first step that raises the loss as its slope
    promises goes uphill on purpose, as gradient ascent does: this is a mismatch, too.
    """
    step = attempt.step()
    attempt = attempt._replace(step=lambda: step)
    promised = slope_along(attempt, jnp.asarray(scale, jnp.float32))
    slope = jnp.where(jnp.isfinite(promised), promised, 0.0)
    excess_at = _EXCESS[kind](attempt, scale, slope)
    unseen = ROUNDING * attempt.resolution if kind == "forward" else 0.0
    seen = unseen * jnp.abs(attempt.loss)

    def may_take(part, excess):
        change = excess + part * slope
        r = ratio(excess, part * slope)
        calm = (slope >= 0) | (r <= accept) | (part * jnp.abs(slope) <= seen)
        return jnp.isfinite(change) & (change <= rise) & calm

    def nearer(search):
        part, excess, looks, alike = search[:4]
        r = ratio(excess, part * slope)
        factor = jnp.where(jnp.isfinite(r), aim / jnp.maximum(r, 1e-9), BLIND)
        stays = is_early & (looks == 1)  # At the parameters: part and excess are kept.
        part = jnp.where((looks > 0) & ~stays, part * jnp.clip(factor, *NEARER), part)
        found = excess_at(jnp.where(stays, 0.0, part))
        change = jnp.abs(excess + part * slope)
        larger = jnp.abs(found) > jnp.maximum(change / 2, OFFSET * rise)
        offset = stays & ((larger & jnp.isfinite(change)) | ~jnp.isfinite(found))
        excess = jnp.where(stays, excess, found)
        same = jnp.abs(ratio(excess, part * slope) - r) <= SAME
        alike = jnp.where(same & (r <= 1) & (looks > 0) & ~stays, alike + 1, 0)
        accepted = may_take(part, excess) & ~stays
        return Search(part, excess, looks + 1, alike, accepted, offset)

    one, zero = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
    no, none = jnp.zeros((), bool), jnp.zeros((), jnp.int32)
    goes_on = lambda s: ~s.accepted & ~s.offset & (s.looks < TRIES)
    first = varying_like_next(nearer, Search(one, zero, none, none, no, no))
    last = jax.lax.while_loop(goes_on, nearer, first)
    part, excess, looks, alike, accepted, offset = last
    blind = part * jnp.abs(slope) <= seen
    known = jnp.isfinite(excess) & jnp.isfinite(promised) & ~blind
    mismatch = offset | (~accepted & (alike >= ALIKE) & known & (slope < 0))
    straight = jnp.abs(excess) <= part * slope / 2
    mismatch |= is_first & known & (slope > 0) & straight
    return Look(part, excess, part * slope, known, blind, accepted, mismatch, looks)


def _forward(attempt: Attempt, scale, slope):
    """Return a function for the excess that takes one forward pass per look."""

    def excess_at(part):
        step = scale_leaves(attempt.step(), uniform(part * scale), attempt.gradient)
        moved = optax.apply_updates(attempt.params, step)
        (there,) = scalar_signal("value_fn", attempt.loss_fn(moved))
        return there - attempt.loss - part * slope

    return excess_at


def _hvp(attempt: Attempt, scale, slope):
    """Return a function for the excess to second order, from one `jvp` of a `jvp`.

    It sees curvature at the parameters alone: not a wall further on.
    """
    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)

    def along(part):
        added = lambda p, d: p + part.astype(p.dtype) * d.astype(p.dtype)
        leaves = iter(map(added, *_inexact(attempt)))
        moved = _trees.map_inexact(
            lambda _: next(leaves), attempt.gradient, attempt.params
        )
        return scalar_signal("value_fn", attempt.loss_fn(moved))[0]

    slope_at = lambda part: jax.jvp(along, (part,), (one,))[1]
    try:
        curvature = jax.jvp(slope_at, (zero,), (one,))[1]
    except (TypeError, NotImplementedError) as error:  # JAX raises one of them.
        if "custom_" not in str(error):
            raise
        raise ValueError(
            'probe="hvp" takes `jvp` of `value_fn`, which has a `jax.custom_vjp` that '
            'allows none. Pass probe="forward".'
        ) from error
    return lambda part: 0.5 * curvature * jnp.square(part * scale)


def _inexact(attempt: Attempt):
    params = _trees.inexact_leaves(attempt.params, attempt.gradient)
    return params, _trees.inexact_leaves(attempt.step(), attempt.gradient)


_EXCESS = {"forward": _forward, "hvp": _hvp}
