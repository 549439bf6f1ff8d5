"""The rate at which a loss on a batch stops falling, estimated in four ways."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _trees
from . import _hessian, _vectors
from ._crossing import crossing

_FINE, _COARSE = 1.005, 1.03  # Relative precision: forward passes, runs of steps.
_DENSE = 2**0.5  # Rates in the probe's way up: the first spike may be a narrow one.
_BELOW = 64.0  # How far below the other estimates the forward search starts.
_NEGLIGIBLE = 1e-4  # Of another length: a shorter one is an accident.
_LEAST, _MOST = 0.04, 0.4  # Second over first difference.
_ROUNDING = 8 * float(np.finfo(np.float32).eps)  # Relative, of a second difference.


class Estimates(NamedTuple):
    """What one batch tells; every field but the direction is a rank-0 float32.

    Lengths are those of a step along the update's direction: `update_norm` times a
    rate. Along a vector of length 1 nothing overflows that the loss itself does not.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array  # Of the optimizer's first step, per unit of learning rate.
    slope: jax.Array  # The loss's first derivative along the direction.
    curvature: jax.Array  # The second.
    directional: jax.Array  # A length.
    forward: jax.Array  # A length.
    probe: jax.Array  # A rate; nan if not asked for.
    parameter: jax.Array  # A rate.
    direction: Any  # The optimizer's first step, of length 1.


@functools.partial(jax.jit, static_argnames=("loss", "tx", "method", "probed"))
def estimate(
    loss, tx, point, data, *, method, probed, steps, built, tolerance, spike
) -> Estimates:
    """All of them, for one batch."""
    value, grads = jax.value_and_grad(loss)(point, data)
    state = tx.init(point)
    updates, _ = tx.update(grads, state, point, value=value)
    update = jax.tree.map(lambda u, x: (u / built).astype(x.dtype), updates, point)
    size = _vectors.norm(update)
    unit = _vectors.divided(update, size)
    slope = _vectors.dot(grads, unit)
    if method == "forward":
        bend = _second_difference(loss, point, data, unit, value, slope)
    else:
        bend = _vectors.dot(unit, _hessian.product(loss, method)(point, data, unit))
    along = directional(slope, bend)
    forward = forward_only(loss, point, data, unit, value, slope, along, tolerance)
    probe = jnp.full((), jnp.nan)
    if probed:
        start = _start(point, value, slope, jnp.minimum(along, forward)) * 8 / size
        limit = value + spike * jnp.abs(value)
        spikes = functools.partial(_spikes, loss, tx, point, data, built, steps, limit)
        probe = crossing(spikes, start, _DENSE, _COARSE)
    return Estimates(
        loss=value,
        gradient_norm=_vectors.norm(grads),
        update_norm=size,
        slope=slope,
        curvature=bend,
        directional=along,
        forward=forward,
        probe=probe,
        parameter=_relative_to_parameters(point, update),
        direction=unit,
    )


@functools.partial(jax.jit, static_argnames="loss")
def elsewhere(loss, point, data, direction, tolerance, forward) -> jax.Array:
    """The first length at which this batch's loss rises along another's direction."""
    value, grads = jax.value_and_grad(loss)(point, data)
    slope = _vectors.dot(grads, direction)
    length = forward_only(
        loss, point, data, direction, value, slope, forward, tolerance
    )
    return jnp.where(slope < 0, length, 0.0)


def directional(slope, curvature) -> jax.Array:
    """Twice the line's minimum, 2 * -g.u / u.Hu; inf where the line does not turn."""
    turns = curvature > 0
    return jnp.where(turns, -2 * slope / jnp.where(turns, curvature, 1), jnp.inf)


def forward_only(loss, point, data, unit, value, slope, along, tolerance) -> jax.Array:
    """The first length at which the loss after one step exceeds the loss before it."""
    limit = value + tolerance * jnp.abs(value)

    def rises(length) -> jax.Array:
        after = loss(_vectors.moved(point, length, unit), data)
        return ~(after <= limit)  # nan rises.

    return crossing(rises, _start(point, value, slope, along), 2.0, _FINE)


def _start(point, value, slope, along) -> jax.Array:
    """A length that is too small by any estimate there is."""
    last_resort = 1e-2 * (_vectors.norm(point) + 1)
    usual = jnp.where(jnp.isfinite(along) & (along > 0), along, last_resort)
    # A loss that happens to be about zero says nothing, and is not to be believed.
    of_value = jnp.maximum(jnp.abs(value / slope), _NEGLIGIBLE * usual)
    return jnp.fmin(usual, of_value) / _BELOW


def _second_difference(loss, point, data, unit, value, slope) -> jax.Array:
    """The curvature along a direction from three losses, (L(h) + L(-h) - 2 L(0)) / h^2.

    The step h is such that the second difference is 4 to 40 % of the first: less drowns
    in rounding, more sees the higher derivatives. It is no longer than the parameters,
    and what rounding alone may have caused there is no curvature.
    """
    reach = _vectors.norm(point) + 1

    def seen(h) -> jax.Array:
        ahead = loss(_vectors.moved(point, h, unit), data)
        behind = loss(_vectors.moved(point, -h, unit), data)
        largest = jnp.maximum(
            jnp.abs(value), jnp.maximum(jnp.abs(ahead), jnp.abs(behind))
        )
        second = (ahead - value) + (behind - value)
        return jnp.where(jnp.abs(second) <= _ROUNDING * largest, 0, second)

    def share(h, second) -> jax.Array:
        return jnp.abs(second / (h * slope))

    def unfit(carry) -> jax.Array:
        h, second, tries = carry
        enough = (share(h, second) >= _LEAST) | (h >= reach)
        return ~(enough & (share(h, second) <= _MOST)) & (tries < 40)

    def adjust(carry):
        h, second, tries = carry
        h = jnp.where(share(h, second) < _LEAST, jnp.minimum(3 * h, reach), h / 4)
        return h, seen(h), tries + 1

    first = 1e-3 * reach
    h, second, _ = lax.while_loop(unfit, adjust, (first, seen(first), 0))
    return second / jnp.square(h)


def _spikes(loss, tx, point, data, built, steps, limit, rate) -> jax.Array:
    """Whether the loss exceeds a limit within some steps of the optimizer; nan does."""

    def calm(carry) -> jax.Array:
        _, _, taken, value = carry
        return (taken <= steps) & (value <= limit)

    def step(carry):
        point, state, taken, _ = carry
        value, grads = jax.value_and_grad(loss)(point, data)
        updates, after = tx.update(grads, state, point, value=value)
        point = _vectors.moved(point, rate / built, updates)
        return point, _like(after, state), taken + 1, value

    start = point, _trees.strongly_typed(tx.init(point)), 0, limit
    return ~(lax.while_loop(calm, step, start)[-1] <= limit)


def _like(tree, reference):
    """The same numbers in the dtypes of `reference`, so that a loop can carry them."""
    return jax.tree.map(
        lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype),
        jax.tree.map(jnp.asarray, tree),
        reference,
    )


def _relative_to_parameters(point, unit) -> jax.Array:
    """The rate at which some leaf moves by a thousandth of its size, root mean square.

    Leaves that start at zero would make it zero; they do not count.
    """

    def ratio(x, u) -> jax.Array:
        size, step = _vectors.norm(x), _vectors.norm(u)
        counts = (size > 0) & (step > 0)
        return jnp.where(counts, size / jnp.where(counts, step, 1), jnp.inf)

    ratios = jax.tree.leaves(jax.tree.map(ratio, point, unit))
    return 1e-3 * jnp.min(jnp.stack(ratios))
