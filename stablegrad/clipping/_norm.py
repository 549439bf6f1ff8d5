"""Clip by a fixed norm."""

import jax
import optax

from ..granularity._groups import Granularity
from ..thresholds._limits import fixed
from ._base import clip_norms, clip_to_threshold


def clip_by_norm(
    max_norm: float | jax.Array, *, per: Granularity = "global"
) -> optax.GradientTransformationExtraArgs:
    """Shrink a gradient to a fixed norm if its norm is larger.

        g <- g * min(1, c / ||g||)

    Unlike `optax.clip_by_global_norm`, it computes the norm in float32, so that float16
    elements of 300 do not overflow, and does not spread a nan.

    Args:
        max_norm: The largest norm c, in the gradient's unit. Finite, >= 0.
        per: The groups that are clipped separately, as for `fixed`.

    Returns:
        A transformation for `optax.chain`. A gradient with a nan or inf, or of norm
        1e18 or more, becomes zeros and is counted in `metrics`.

    Raises:
        ValueError: If a concrete `max_norm` is out of range.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_by_norm(1.0), optax.sgd(1.0))
        >>> params = jnp.zeros(2)
        >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
        >>> [round(x, 3) for x in updates.tolist()]
        [-0.6, -0.8]
        >>> updates, state = tx.update(jnp.array([3e20, 4e20]), state, params)
        >>> abs(updates).tolist()
        [0.0, 0.0]
        >>> sg.metrics(state)["clip_by_norm_dropped_steps"].item()
        1

    Reference:
        Pascanu et al. (2013), https://arxiv.org/abs/1211.5063.
    """
    return clip_norms("clip_by_norm", clip_to_threshold(fixed(max_norm, per=per)))
