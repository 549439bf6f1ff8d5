"""Limit the direction of a gradient against that of the steps before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _trees
from .._checks import require, require_count
from .._compiled import CompiledUpdate
from .._norms import measure
from ._readings import ClipReadings, init_readings, read

NAME = "limit_direction"
# The mean of unit vectors is as long as they agree: 0.2 if they are independent.
LEAST_LENGTH = 0.5


class DirectionState(NamedTuple):
    """State of `limit_direction`."""

    mean_direction: Any  # float32 or complex64, shaped like the parameters.
    direction_steps: jax.Array  # int32: steps in the mean, saturating.
    clip_readings: dict[str, ClipReadings]


def limit_direction(
    min_cosine: float | jax.Array = -0.5,
    *,
    decay: float | jax.Array = 0.9,
    warmup_steps: int = 25,
) -> optax.GradientTransformationExtraArgs:
    """Turns a gradient that points against the running mean direction, and no further.

        m_t = d m_{t-1} + (1 - d) g_t / ||g_t||;    c_t = cos(g_t, m_{t-1})
        if c_t < C and ||m_{t-1}|| >= 1/2:  the part of g_t along m is changed so that
            the cosine is C; if that made g_t longer, it is shortened to its old norm

    The mean learns from the direction of every finite gradient, as it came: no
    outlier's size can bend it, and a lasting turn is the new direction within ten steps
    at d = 0.9. Directions that cancel each other have a short mean, and no limit.

    Args:
        min_cosine: Smallest cosine C that is still normal, in (-1, 1). Independent
            gradients of many elements have cosines near 0.
        decay: Weight d of the past, in [0, 1). Half-life 7 steps at 0.9.
        warmup_steps: Finite steps before anything is turned, >= 1.

    Returns:
        A transformation for `optax.chain`. A step with a nan or inf anywhere becomes
        all zeros, and is counted. The state holds one float32 a parameter.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.limit_direction(-0.5), optax.sgd(0.1))

    Reference:
        Own work; the direction is that of momentum, Polyak (1964).
    """
    require("min_cosine", min_cosine, "in (-1, 1)", lambda x: -1 < x < 1)
    require("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)
    require_count("warmup_steps", warmup_steps)

    def init_fn(params) -> DirectionState:
        own = (jnp.zeros((), jnp.int32), init_readings(NAME))
        return DirectionState(_zeros(params), *_trees.distinct(own))

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        measured = measure(updates)
        mean = state.mean_direction
        usable = measured.finite & (measured.norm > 0)
        norm = jnp.where(usable, measured.norm, 1.0)
        unit = _trees.map_inexact(
            lambda g: (g / norm).astype(_wide(g)), updates, updates
        )
        length = measure(mean, updates).norm
        inverse = 1 / jnp.maximum(length, 1e-12)
        cosine = jnp.clip(_dot(unit, mean, updates) * inverse, -1.0, 1.0)
        ready = state.direction_steps >= warmup_steps
        turns = usable & ready & (length >= LEAST_LENGTH) & (cosine < min_cosine)
        across = jnp.sqrt(1 - jnp.square(cosine))
        side = jnp.sqrt(1 - jnp.square(jnp.asarray(min_cosine, jnp.float32)))
        along = min_cosine * across / side
        # A positive C may lengthen the gradient, which is not ours to do.
        shorter = jnp.minimum(1.0, side / jnp.maximum(across, 1e-12))

        def turned(g, u, m):
            new = (shorter * norm) * (u + ((along - cosine) * inverse) * m)
            return jnp.where(turns, new, g).astype(g.dtype)

        out = _trees.map_inexact(turned, updates, updates, unit, mean)
        finite = measured.finite
        out = _trees.zero_unless(finite, out, updates)
        followed = _trees.map_inexact(
            lambda m, u: decay * m + (1 - decay) * u, updates, mean, unit
        )
        left = jnp.where(turns, shorter * jnp.hypot(across, along), 1.0)
        readings = read(
            state.clip_readings,
            raw=measured.norm,
            clipped=jnp.where(finite, left * measured.norm, 0.0),
            limit=jnp.asarray(min_cosine, jnp.float32),
            scale=left,
            finite=finite,
            shrunk=turns,
        )
        return out, DirectionState(
            _trees.select(usable, _trees.cast_like(followed, mean), mean),
            _trees.count_if(usable, state.direction_steps),
            readings,
        )

    return optax.GradientTransformationExtraArgs(init_fn, CompiledUpdate(update_fn))


def _wide(leaf):
    """float32, or its complex counterpart."""
    return jnp.complex64 if jnp.iscomplexobj(leaf) else jnp.float32


def _zeros(params):
    return jax.tree.map(lambda p: jnp.zeros_like(p, _wide(p)), params)


def _dot(a, b, like) -> jax.Array:
    pairs = zip(
        _trees.inexact_leaves(a, like), _trees.inexact_leaves(b, like), strict=True
    )
    return sum(
        (jnp.real(jnp.sum(x * jnp.conj(y))) for x, y in pairs),
        jnp.zeros((), jnp.float32),
    )
