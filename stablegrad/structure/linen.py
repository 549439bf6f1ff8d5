"""`limit_gradient` as a layer of Flax Linen."""

import jax
from flax import linen

from ._limit_gradient import limit_gradient


class LimitGradient(linen.Module):
    """A layer that applies `stablegrad.limit_gradient` to its input.

    Example:
        >>> from flax import linen
        >>> from stablegrad.structure.linen import LimitGradient
        >>> layers = [linen.Dense(8), LimitGradient(1.0), linen.Dense(2)]
        >>> model = linen.Sequential(layers)
    """

    max_norm: float
    per: str = "example"

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x`."""
        return limit_gradient(x, self.max_norm, per=self.per)
