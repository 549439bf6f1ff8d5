"""Estimates of the largest stable learning rate from one batch."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from .. import _trees
from .._norms import measure
from . import _hessian
from ._crossing import crossing
from ._loss import step

_FORWARD_PRECISION, _PROBE_PRECISION = 1.005, 1.03  # Relative, of the two searches.
_PROBE_GROWTH = 2**0.5  # Factor between probed rates; the first spike may be narrow.
_START_BELOW = 64.0  # The searches start this factor below the other estimates.
_NEGLIGIBLE = 1e-4  # A length this small relative to another one is accidental.
_LEAST, _MOST = 0.04, 0.4  # Bounds on the second over the first difference.
_ROUNDING = 8 * float(np.finfo(np.float32).eps)  # Relative, of a second difference.


class Estimates(NamedTuple):
    """Estimates from one batch; every field but `direction` is a rank-0 array.

    A length is a learning rate times `update_norm`: it overflows only if the loss does.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array  # Norm of the first update, per unit of learning rate.
    slope: jax.Array  # First derivative of the loss along `direction`.
    curvature: jax.Array  # Second derivative of the loss along `direction`.
    directional: jax.Array  # A length.
    forward: jax.Array  # A length.
    probe: jax.Array  # A learning rate; nan without probe steps.
    parameter: jax.Array  # A learning rate.
    direction: Any  # The first update, scaled to norm 1.


@functools.partial(jax.jit, static_argnames=("loss", "tx", "method", "probed"))
def estimate(
    loss, tx, params, data, method, probed, *, steps, rate, tolerance, spike
) -> Estimates:
    """Compute all estimates for one batch; `rate` is the one `tx` was built with."""
    value, grads = jax.value_and_grad(loss)(params, data)
    updates, _ = tx.update(grads, tx.init(params), params, value=value)
    update = jax.tree.map(lambda u, x: (u / rate).astype(x.dtype), updates, params)
    before, moved = measure(params), measure(update)
    size = jnp.where(moved.norm > 0, moved.norm, 1)
    direction = jax.tree.map(lambda u: u / size, update)
    slope = jnp.asarray(optax.tree.vdot(grads, direction), jnp.float32)
    scale = before.norm + 1
    loss_at = lambda h: loss(_hessian.move(params, h, direction), data)
    if method == "forward":
        curvature = _second_difference(loss_at, value, slope, scale)
    else:
        product = _hessian.product(loss, method, params, data, direction)
        curvature = jnp.asarray(optax.tree.vdot(direction, product), jnp.float32)
    directional = jnp.where(curvature > 0, -2 * slope / curvature, jnp.inf)
    forward = _first_rise(loss_at, value, slope, scale, directional, tolerance)
    probe = jnp.full((), jnp.nan)
    if probed:
        guess = jnp.minimum(directional, forward)
        start = _start(value, slope, scale, guess) * 8 / moved.norm
        limit = value + spike * jnp.abs(value)
        spikes = lambda r: _spikes(loss, tx, params, data, steps, limit, r / rate)
        probe = crossing(spikes, start, _PROBE_GROWTH, _PROBE_PRECISION)
    # Leaves that start at zero do not count: they would make the rate zero.
    counted = (before.leaf_norms > 0) & (moved.leaf_norms > 0)
    ratios = jnp.where(counted, before.leaf_norms / moved.leaf_norms, jnp.inf)
    return Estimates(
        loss=value,
        gradient_norm=measure(grads).norm,
        update_norm=moved.norm,
        slope=slope,
        curvature=curvature,
        directional=directional,
        forward=forward,
        probe=probe,
        parameter=1e-3 * jnp.min(ratios),
        direction=direction,
    )


@functools.partial(jax.jit, static_argnames="loss")
def cross_batch(loss, params, data, direction, forward, tolerance) -> jax.Array:
    """Return the `forward` length on this batch along another batch's direction."""
    value, grads = jax.value_and_grad(loss)(params, data)
    slope = jnp.asarray(optax.tree.vdot(grads, direction), jnp.float32)
    scale = measure(params).norm + 1
    loss_at = lambda h: loss(_hessian.move(params, h, direction), data)
    length = _first_rise(loss_at, value, slope, scale, forward, tolerance)
    return jnp.where(slope < 0, length, 0.0)


def _first_rise(loss_at, value, slope, scale, guess, tolerance) -> jax.Array:
    """Return the first length at which the loss rises by more than the tolerance."""
    limit = value + tolerance * jnp.abs(value)
    start = _start(value, slope, scale, guess)
    # A nan is not below the limit, so it counts as a rise.
    return crossing(lambda h: ~(loss_at(h) <= limit), start, 2.0, _FORWARD_PRECISION)


def _start(value, slope, scale, guess) -> jax.Array:
    """Return a length that is smaller than all available estimates."""
    usual = jnp.where(jnp.isfinite(guess) & (guess > 0), guess, 1e-2 * scale)
    # A loss that happens to be close to zero is no estimate of the length.
    by_value = jnp.maximum(jnp.abs(value / slope), _NEGLIGIBLE * usual)
    return jnp.fmin(usual, by_value) / _START_BELOW


def _second_difference(loss_at, value, slope, scale) -> jax.Array:
    """Return the curvature along a line, (L(h) + L(-h) - 2 L(0)) / h^2.

    Choose a step h <= `scale` whose second difference is 4 to 40 % of the first: a
    shorter step suffers from rounding, a longer one from higher derivatives. A second
    difference within rounding error counts as zero.
    """

    def difference(h) -> jax.Array:
        ahead, behind = loss_at(h), loss_at(-h)
        largest = jnp.max(jnp.abs(jnp.stack([value, ahead, behind])))
        second = (ahead - value) + (behind - value)
        return jnp.where(jnp.abs(second) <= _ROUNDING * largest, 0, second)

    ratio = lambda h, second: jnp.abs(second / (h * slope))

    def unsuitable(carry) -> jax.Array:
        h, second, tries = carry
        enough = (ratio(h, second) >= _LEAST) | (h >= scale)
        return ~(enough & (ratio(h, second) <= _MOST)) & (tries < 40)

    def adjust(carry):
        h, second, tries = carry
        h = jnp.where(ratio(h, second) < _LEAST, jnp.minimum(3 * h, scale), h / 4)
        return h, difference(h), tries + 1

    first = 1e-3 * scale
    h, second, _ = lax.while_loop(unsuitable, adjust, (first, difference(first), 0))
    return second / jnp.square(h)


def _spikes(loss, tx, params, data, steps, limit, scale) -> jax.Array:
    """Return whether the loss exceeds a limit or is nan within some steps."""
    # The carry is (value, params, state, steps taken).
    below = lambda carry: (carry[3] <= steps) & (carry[0] <= limit)

    def advance(carry):
        _, params, state, taken = carry
        value, params, new = step(loss, tx, params, state, data, scale)
        # The loop needs constant dtypes; those of a state may change after `init`.
        state = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, state)
        return value, params, state, taken + 1

    start = limit, params, _trees.strongly_typed(tx.init(params)), 0
    return ~(lax.while_loop(below, advance, start)[0] <= limit)
