"""Limit the angle between a gradient and the direction of the steps before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _trees
from .._checks import require, require_steps
from .._leaf_sums import leaf_dots
from .._norms import measure
from ._base import Clipped, transformation
from ._readings import ClipNumbers

# The mean of equal unit vectors has length 1, of independent ones about 0.2.
LEAST_LENGTH = 0.5
LEAST_NORM = float(jnp.finfo(jnp.float32).tiny) ** 0.5  # Below it squares lose digits.


class DirectionState(NamedTuple):
    mean_direction: Any  # float32 or complex64, shaped like the parameters.
    clip_numbers: ClipNumbers  # Readings and statistics.


def limit_direction(
    min_cosine: float | jax.Array = -0.5,
    *,
    decay: float | jax.Array = 0.9,
    warmup_steps: int = 25,
) -> optax.GradientTransformationExtraArgs:
    """Turn a gradient that points against the running mean direction.

        m_t = d m_{t-1} + (1 - d) g_t / ||g_t||;    c_t = cos(g_t, m_{t-1})
        if c_t < C and ||m_{t-1}|| >= 1/2:  change the part of g_t along m so that the
            cosine is C, and shorten g_t to its old norm if that made it longer

    The mean follows finite gradients before they are turned: the size of an outlier
    cannot bend it. Directions that cancel each other have a short mean, and no limit.

    Args:
        min_cosine: Smallest cosine C that is still normal, in (-1, 1). Independent
            gradients of many elements have cosines near 0.
        decay: Weight d of the past, in [0, 1). Half-life 7 steps at 0.9.
        warmup_steps: Finite steps before anything is turned, >= 1.

    Returns:
        A transformation for `optax.chain`. A gradient with a nan or inf, or of norm
        1e18 or more, becomes zeros; one of norm below 1e-19 passes and leaves the mean
        as it was. The state holds one float32 a parameter.

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
    require_steps("warmup_steps", warmup_steps)

    start = lambda tree: (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
    unseen = lambda params: (
        jax.tree.map(lambda p: jnp.zeros_like(p, _wide(p)), params),
    )

    def step(updates, statistics, memory, params, extra) -> Clipped:
        mean_square, steps = statistics  # The squared length of the mean; its steps.
        (mean,) = memory
        measured = measure(updates)
        finite = measured.finite
        usable = finite & (measured.norm >= LEAST_NORM)
        norm = jnp.where(usable, measured.norm, 1.0)
        to_unit = 1 / norm  # A division by element would be computed apart on a CPU.
        length = jnp.sqrt(mean_square)
        inverse = 1 / jnp.maximum(length, 1e-12)
        leaves, means = (_trees.inexact_leaves(x, updates) for x in (updates, mean))
        along_mean = jnp.sum(leaf_dots(leaves, means)) * to_unit
        cosine = jnp.clip(along_mean * inverse, -1.0, 1.0)
        ready = steps >= warmup_steps
        least = jnp.asarray(min_cosine, jnp.float32)
        turns = usable & ready & (length >= LEAST_LENGTH) & (cosine < least)
        across = jnp.sqrt(1 - jnp.square(cosine))
        side = jnp.sqrt(1 - jnp.square(least))
        along = least * across / side
        # A positive C may lengthen the gradient.
        shorter = jnp.minimum(1.0, side / jnp.maximum(across, 1e-12))

        def turned(g, m):
            u = g.astype(m.dtype) * to_unit
            new = (shorter * norm) * (u + ((along - cosine) * inverse) * m)
            return jnp.where(turns, new.astype(g.dtype), g)

        def followed(m, g):
            new = decay * m + (1 - decay) * (g.astype(m.dtype) * to_unit)
            return jnp.where(usable, new.astype(m.dtype), m)

        out = _trees.map_inexact(turned, updates, updates, mean)
        # The length of a mean of unit vectors follows from its old length and the dot
        # product alone, without a pass over the mean.
        square = (
            jnp.square(decay) * mean_square
            + 2 * decay * (1 - decay) * along_mean
            + jnp.square(1 - decay)
        )
        left = jnp.where(turns, shorter * jnp.hypot(across, along), 1.0)
        square = jnp.where(usable, jnp.maximum(square, 0.0), mean_square)
        return Clipped(
            _trees.zero_unless(finite, out, updates),
            (square, _trees.count_if(usable, steps)),
            measured,
            left * measured.norm,
            limit=least,
            scale=left,
            memory=(_trees.map_inexact(followed, updates, mean, updates),),
            shrunk=turns,
        )

    return transformation("limit_direction", DirectionState, start, step, unseen)


def _wide(leaf):
    """Return float32, or its complex counterpart."""
    return jnp.complex64 if jnp.iscomplexobj(leaf) else jnp.float32
