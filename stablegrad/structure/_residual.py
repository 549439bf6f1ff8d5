"""The sum of a residual branch with a learned factor."""

import jax
import numpy as np


def scaled_residual(x: jax.Array, scale: jax.Array, branch: jax.Array) -> jax.Array:
    """Return x + scale branch in the dtype of `x`, multiplied in float32 or wider."""
    wide = np.promote_types(scale.dtype, branch.dtype)
    return x + (scale.astype(wide) * branch.astype(wide)).astype(x.dtype)
