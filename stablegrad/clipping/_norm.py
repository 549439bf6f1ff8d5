"""Clip by a fixed norm."""

import jax
import optax

from ..granularity._groups import Granularity
from ..thresholds._limits import fixed
from ._base import by_threshold, clipping


def clip_by_norm(
    max_norm: float | jax.Array, *, per: Granularity = "global"
) -> optax.GradientTransformationExtraArgs:
    """Shrinks a gradient to a fixed norm, if it is larger.

        g <- g * min(1, c / ||g||)

    Beside `optax.clip_by_global_norm`: the norm is float32 and cannot overflow, so that
    float16 elements of 300 and float32 elements of 1e20 are shrunk to size, not to
    zero; the gradient is multiplied by one factor, which XLA fuses, not divided; and
    a nan does not spread.

    Args:
        max_norm: The largest norm c, in the gradient's unit. Finite, >= 0.
        per: For what, as for `fixed`.

    Returns:
        A transformation for `optax.chain`. A step with a nan or inf anywhere becomes
        all zeros, and is counted.

    Raises:
        ValueError: If a concrete `max_norm` is out of range.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_by_norm(1.0), optax.sgd(1.0))
        >>> params = jnp.zeros(2)
        >>> grads = jnp.array([3e20, 4e20])
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> [round(x, 3) for x in updates.tolist()]
        [-0.6, -0.8]

    Reference:
        Pascanu et al., On the difficulty of training recurrent neural networks (2013),
        https://arxiv.org/abs/1211.5063.
    """
    return clipping("clip_by_norm", by_threshold(fixed(max_norm, per=per)))
