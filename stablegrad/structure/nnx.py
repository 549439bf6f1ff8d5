"""Layers of Flax NNX that keep signals and gradients in scale."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .. import _trees
from .._checks import require_count
from ._attention_arguments import mask_of
from ._initializers import deepnorm
from ._limit_gradient import limit_gradient
from ._logits import attend, soft_cap
from ._residual import scaled_residual


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
        limit_gradient(jnp.zeros(1), max_norm, per=per)  # Checks them.
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
        return scaled_residual(x, self.scale[...], self.branch(x))


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
    """The largest attention logit of each head in the last call."""


class Attention(nnx.Module):
    """The `attention_fn` of an `nnx.MultiHeadAttention` with bounded, watched logits.

    `largest_logits(model)` returns the largest logits of its last call, as
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
        require_count("heads", heads)
        if cap is not None:
            soft_cap(jnp.zeros(1), cap)  # Checks it.
        self.cap, self.qk_norm = cap, qk_norm
        self.largest_logits = LargestLogits(jnp.zeros((heads,), jnp.float32))

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **arguments
    ) -> jax.Array:
        """Return the output, shape (..., queries, heads, depth)."""
        mask = mask_of(query, key, **arguments)
        settings: dict[str, Any] = {"cap": self.cap, "qk_norm": self.qk_norm}
        output, largest = attend(query, key, value, mask, **settings)
        heads = self.largest_logits[...].shape
        if heads != largest.shape:
            raise ValueError(
                f"`Attention` was made for {heads[0]} heads, got {largest.size}."
            )
        self.largest_logits[...] = largest
        return output


def largest_logits(model: Any) -> dict[str, jax.Array]:
    """Return the largest logits of the last call of each attention.

    Args:
        model: A module, or a pytree of modules, with `Attention` in its attentions.

    Returns:
        From the dotted name of each attention to an array of shape (heads,): what
        `clip_logits` takes as `largest_logits=`. Of several calls of one attention it
        is that of the last; take the maximum yourself if a pass calls a layer twice.

    Raises:
        ValueError: If two attention layers share one `Attention`.
    """
    owners: dict[int, str] = {}
    for path, node in nnx.iter_graph(model):
        for held in getattr(node, "__dict__", {}).values():
            if isinstance(held, Attention):
                name = ".".join(map(str, path))
                if id(held) in owners:
                    raise ValueError(
                        f"{owners[id(held)]!r} and {name!r} share one `Attention`. "
                        "Give each attention layer one of its own."
                    )
                owners[id(held)] = name
    state = _trees.without_variables(nnx.state(model, LargestLogits))
    rows = jax.tree_util.tree_flatten_with_path(state)[0]
    return {_trees.path_name(path[:-2]) if path[:-2] else "": x for path, x in rows}
