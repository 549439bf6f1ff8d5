"""The rate at which a loss on a batch stops falling, estimated in four ways."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _trees
from . import _hessian, _vectors
from ._crossing import crossing

_FINE, _COARSE = 1.005, 1.03  # Relative precision: forward passes, runs of steps.
_DENSE = 2**0.5  # Rates in the probe's way up: the first spike may be a narrow one.
_BELOW = 64.0  # How far below the other estimates the forward search starts.


class Estimates(NamedTuple):
    """What one batch tells; every field but the update is a rank-0 float32."""

    loss: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    slope: jax.Array  # g.u: the loss's derivative along the update.
    curvature: jax.Array  # u.Hu.
    directional: jax.Array  # Rates from here on.
    forward: jax.Array
    probe: jax.Array  # nan if not asked for.
    polyak: jax.Array
    parameter: jax.Array
    update: Any  # The optimizer's first step per unit of learning rate.


@functools.partial(jax.jit, static_argnames=("loss", "tx", "method", "probed"))
def estimate(
    loss, tx, point, data, *, method, probed, steps, built, tolerance, spike, best
) -> Estimates:
    """All of them, for one batch."""
    value, grads = jax.value_and_grad(loss)(point, data)
    state = tx.init(point)
    updates, _ = tx.update(grads, state, point, value=value)
    unit = jax.tree.map(lambda u, x: (u / built).astype(x.dtype), updates, point)
    slope = _vectors.dot(grads, unit)
    if method == "forward":
        bend = _second_difference(loss, point, data, unit, value, slope)
    else:
        bend = _vectors.dot(unit, _hessian.product(loss, method)(point, data, unit))
    along = directional(slope, bend)
    forward = forward_only(loss, point, data, unit, value, slope, along, tolerance)
    probe = jnp.full((), jnp.nan)
    if probed:
        start = _start(point, unit, value, slope, jnp.minimum(along, forward)) * 8
        limit = value + spike * jnp.abs(value)
        spikes = functools.partial(_spikes, loss, tx, point, data, built, steps, limit)
        probe = crossing(spikes, start, _DENSE, _COARSE)
    return Estimates(
        loss=value,
        gradient_norm=_vectors.norm(grads),
        update_norm=_vectors.norm(unit),
        slope=slope,
        curvature=bend,
        directional=along,
        forward=forward,
        probe=probe,
        polyak=(value - best) / -slope,
        parameter=_relative_to_parameters(point, unit),
        update=unit,
    )


@functools.partial(jax.jit, static_argnames="loss")
def elsewhere(loss, point, data, update, tolerance, forward) -> jax.Array:
    """The first rate at which this batch's loss rises along another batch's update."""
    value, grads = jax.value_and_grad(loss)(point, data)
    slope = _vectors.dot(grads, update)
    rate = forward_only(loss, point, data, update, value, slope, forward, tolerance)
    return jnp.where(slope < 0, rate, 0.0)


def directional(slope, curvature) -> jax.Array:
    """Twice the line's minimum, 2 * -g.u / u.Hu; inf where the line does not turn."""
    turns = curvature > 0
    return jnp.where(turns, -2 * slope / jnp.where(turns, curvature, 1), jnp.inf)


def forward_only(loss, point, data, unit, value, slope, along, tolerance) -> jax.Array:
    """The first rate at which the loss after one step exceeds the loss before it."""
    limit = value + tolerance * jnp.abs(value)

    def rises(rate) -> jax.Array:
        after = loss(_vectors.moved(point, rate, unit), data)
        return ~(after <= limit)  # nan rises.

    return crossing(rises, _start(point, unit, value, slope, along), 2.0, _FINE)


def _start(point, unit, value, slope, along) -> jax.Array:
    """A rate that is too small by any estimate there is."""
    usual = jnp.stack([along, jnp.abs(value / slope)])
    usual = jnp.where(jnp.isfinite(usual) & (usual > 0), usual, jnp.inf)
    last_resort = 1e-2 * (_vectors.norm(point) + 1) / _vectors.norm(unit)  # May be inf.
    best = jnp.min(usual)
    return jnp.where(jnp.isinf(best), last_resort, best) / _BELOW


def _second_difference(loss, point, data, unit, value, slope) -> jax.Array:
    """u.Hu from three losses, (L(h) + L(-h) - 2 L(0)) / h^2.

    The step h changes the loss by 0.1 to 10 %: less drowns in rounding, more sees the
    higher derivatives.
    """

    def change(h) -> jax.Array:
        after = loss(_vectors.moved(point, h, unit), data)
        return jnp.abs(after - value) / jnp.abs(value)

    def unfit(carry) -> jax.Array:
        _, seen, tries = carry
        return ~((seen >= 1e-3) & (seen <= 1e-1)) & (tries < 40)

    def adjust(carry):
        h, seen, tries = carry
        h = jnp.where(seen < 1e-3, 3 * h, h / 4)
        return h, change(h), tries + 1

    first = 0.03 * jnp.abs(value / slope)
    h, _, _ = lax.while_loop(unfit, adjust, (first, change(first), 0))
    ahead = loss(_vectors.moved(point, h, unit), data)
    behind = loss(_vectors.moved(point, -h, unit), data)
    return (ahead - 2 * value + behind) / jnp.square(h)


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
