"""`limit_gradient` as a layer of Flax NNX."""

import jax
from flax import nnx

from ._limit_gradient import limit_gradient


class LimitGradient(nnx.Module):
    """A layer that applies `stablegrad.limit_gradient` to its input.

    Example:
        >>> from flax import nnx
        >>> from stablegrad.structure.nnx import LimitGradient
        >>> layers = [nnx.Linear(4, 8, rngs=nnx.Rngs(0)), LimitGradient(1.0)]
        >>> model = nnx.Sequential(*layers)
    """

    def __init__(self, max_norm: float, *, per: str = "example"):
        """Store the settings; the layer has no parameters."""
        self.max_norm, self.per = max_norm, per

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x`."""
        return limit_gradient(x, self.max_norm, per=self.per)
