"""Layers of Flax NNX that keep signals and gradients in scale."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .. import _trees
from ._attention_arguments import mask_of
from ._initializers import deepnorm
from ._limit_gradient import limit_gradient
from ._logits import attend


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


class ScaledResidual(nnx.Module):
    """A residual branch with a learned scalar factor: x + a branch(x).

    With a = 0 at the start (SkipInit, ReZero) the network starts as the identity, at
    any depth and without a norm; with 1 it is the branch of Fixup.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from stablegrad.structure.nnx import ScaledResidual
        >>> block = ScaledResidual(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
        >>> bool((block(jnp.ones((2, 4))) == 1).all())
        True

    Reference:
        De and Smith (2020), https://arxiv.org/abs/2002.10444.
    """

    def __init__(
        self, branch: Callable[[jax.Array], jax.Array], *, scale_init: float = 0.0
    ):
        """`branch` keeps the shape; `scale_init` is the factor at the start."""
        self.branch = branch
        self.scale = nnx.Param(jnp.asarray(scale_init, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array of the shape and dtype of `x`."""
        return x + (self.scale[...] * self.branch(x)).astype(x.dtype)


class PreNormBlock(nnx.Module):
    """A residual branch behind a norm: x + branch(norm(x)).

    Example:
        >>> from flax import nnx
        >>> from stablegrad.structure.nnx import PreNormBlock
        >>> rngs = nnx.Rngs(0)
        >>> block = PreNormBlock(nnx.Linear(8, 8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs))

    Reference:
        Xiong et al. (2020), https://arxiv.org/abs/2002.04745.
    """

    def __init__(
        self,
        branch: Callable[[jax.Array], jax.Array],
        norm: Callable[[jax.Array], jax.Array],
    ):
        """`branch` keeps the shape; `norm` is `nnx.LayerNorm` or `nnx.RMSNorm`."""
        self.branch, self.norm = branch, norm

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array of the shape of `x`."""
        return x + self.branch(self.norm(x))


class DeepNormBlock(nnx.Module):
    """A residual branch of DeepNorm, in front of a norm: norm(alpha x + branch(x)).

    The kernels of the branch start from `deepnorm_init(layers)`.

    Example:
        >>> from flax import nnx
        >>> from stablegrad.structure.nnx import DeepNormBlock
        >>> rngs = nnx.Rngs(0)
        >>> norm = nnx.LayerNorm(8, rngs=rngs)
        >>> block = DeepNormBlock(nnx.Linear(8, 8, rngs=rngs), norm, layers=12)

    Reference:
        Wang et al. (2022), https://arxiv.org/abs/2203.00555.
    """

    def __init__(
        self,
        branch: Callable[[jax.Array], jax.Array],
        norm: Callable[[jax.Array], jax.Array],
        *,
        layers: int,
    ):
        """`branch` keeps the shape; `layers` are those of two branches each."""
        self.branch, self.norm = branch, norm
        self.residual_scale = deepnorm(layers).residual_scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array of the shape of `x`."""
        return self.norm(self.residual_scale * x + self.branch(x))


class LargestLogits(nnx.Variable):
    """The largest attention logit of each head in the last forward pass."""


class Attention(nnx.Module):
    """The `attention_fn` of an `nnx.MultiHeadAttention` with bounded, watched logits.

    `largest_logits(model)` returns the largest logits of the last call, as
    `clip_logits` needs them. Each attention layer needs an `Attention` of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from stablegrad.structure.nnx import Attention, largest_logits
        >>> layer = nnx.MultiHeadAttention(
        ...     4, 16, decode=False, attention_fn=Attention(4, cap=50.0),
        ...     rngs=nnx.Rngs(0),
        ... )
        >>> output = layer(jnp.ones((2, 5, 16)))
        >>> largest_logits({"layer": layer})["layer"].shape
        (4,)
    """

    def __init__(self, heads: int, *, cap: float | None = None, qk_norm: bool = False):
        """Settings as for `attend`; `heads` are those of the attention."""
        self.cap, self.qk_norm = cap, qk_norm
        self.largest_logits = LargestLogits(jnp.zeros((heads,), jnp.float32))

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **arguments
    ) -> jax.Array:
        """Return the output, shape (..., queries, heads, depth)."""
        mask = mask_of(query, key, **arguments)
        settings: dict[str, Any] = {"cap": self.cap, "qk_norm": self.qk_norm}
        output, largest = attend(query, key, value, mask, **settings)
        self.largest_logits[...] = largest
        return output


def largest_logits(model: Any) -> dict[str, jax.Array]:
    """Return the largest logits of the last forward pass, by attention.

    Args:
        model: A module, or a pytree of modules, with `Attention` in its attentions.

    Returns:
        From the dotted name of each attention to an array of shape (heads,): what
        `clip_logits` takes as `largest_logits=`.
    """
    state = _trees.without_variables(nnx.state(model, LargestLogits))
    rows = jax.tree_util.tree_flatten_with_path(state)[0]
    return {_trees.path_name(path[:-2]) if path[:-2] else "": x for path, x in rows}
