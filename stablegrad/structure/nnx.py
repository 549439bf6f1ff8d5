"""`limit_gradient` as a layer of Flax NNX."""

import jax
from flax import nnx

from ._limit_gradient import limit_gradient


class LimitGradient(nnx.Module):
    """A layer that returns its input, and limits the gradient that flows back.

    Args:
        max_norm: As for `stablegrad.limit_gradient`.
        per: As for `stablegrad.limit_gradient`.

    Example:
        >>> from flax import nnx
        >>> from stablegrad.structure.nnx import LimitGradient
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(
        ...     nnx.Linear(4, 8, rngs=rngs),
        ...     LimitGradient(1.0),
        ...     nnx.Linear(8, 2, rngs=rngs),
        ... )
    """

    def __init__(self, max_norm: float, *, per: str = "example"):
        """Stores the settings; the layer has no parameters."""
        self.max_norm, self.per = max_norm, per

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `x`."""
        return limit_gradient(x, self.max_norm, per=self.per)
