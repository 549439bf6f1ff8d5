"""Layers of Flax Linen that keep signals and gradients in scale."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from .. import _trees
from ._attention_arguments import mask_of
from ._initializers import deepnorm
from ._limit_gradient import limit_gradient
from ._logits import attend
from ._residual import scaled_residual


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


class ScaledResidual(linen.Module):
    """A residual branch with a learned scalar factor: x + a branch(x).

    With a = 0 at the start (SkipInit, ReZero) the network starts as the identity, at
    any depth and without a norm; with 1 it is the branch of Fixup.

    Example:
        >>> from flax import linen
        >>> from stablegrad.structure.linen import ScaledResidual
        >>> block = ScaledResidual(linen.Dense(4))

    Reference:
        De and Smith (2020), https://arxiv.org/abs/2002.10444.
    """

    branch: Callable[[jax.Array], jax.Array]
    scale_init: float = 0.0

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array of the shape and dtype of `x`."""
        start = linen.initializers.constant(self.scale_init)
        scale = self.param("scale", start, (), jnp.float32)
        return scaled_residual(x, scale, self.branch(x))


class PreNormBlock(linen.Module):
    """A residual branch behind a norm: x + branch(norm(x)).

    Example:
        >>> from flax import linen
        >>> from stablegrad.structure.linen import PreNormBlock
        >>> block = PreNormBlock(linen.Dense(8), linen.RMSNorm())

    Reference:
        Xiong et al. (2020), https://arxiv.org/abs/2002.04745.
    """

    branch: Callable[[jax.Array], jax.Array]
    norm: Callable[[jax.Array], jax.Array]

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array of the shape of `x`."""
        return x + self.branch(self.norm(x))


class DeepNormBlock(linen.Module):
    """A residual branch of DeepNorm, in front of a norm: norm(alpha x + branch(x)).

    The kernels of the branch start from `deepnorm_init(layers)`.

    Example:
        >>> from flax import linen
        >>> from stablegrad.structure.linen import DeepNormBlock
        >>> block = DeepNormBlock(linen.Dense(8), linen.LayerNorm(), layers=12)

    Reference:
        Wang et al. (2022), https://arxiv.org/abs/2203.00555.
    """

    branch: Callable[[jax.Array], jax.Array]
    norm: Callable[[jax.Array], jax.Array]
    layers: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array of the shape of `x`."""
        return self.norm(deepnorm(self.layers).residual_scale * x + self.branch(x))


class Attention(linen.Module):
    """The `attention_fn` of Linen's attention, with bounded and watched logits.

    Each attention needs one of its own. Settings as for `attend`. Where "intermediates"
    are mutable, it sows its largest logits, which `largest_logits` reads. Within
    `@linen.compact`, write `Attention(parent=None)`: it then belongs to the layer that
    it is passed to, and has that layer's name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen
        >>> from stablegrad.structure.linen import Attention, largest_logits
        >>> layer = linen.MultiHeadDotProductAttention(4, attention_fn=Attention(50.0))
        >>> x = jnp.ones((2, 5, 16))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> output, seen = layer.apply(variables, x, mutable=["intermediates"])
        >>> {name: s.shape for name, s in largest_logits(seen["intermediates"]).items()}
        {'': (4,)}
    """

    cap: float | None = None
    qk_norm: bool = False

    @linen.compact
    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **arguments
    ) -> jax.Array:
        """Return the output, shape (..., queries, heads, depth)."""
        mask = mask_of(query, key, **arguments)
        output, largest = attend(
            query, key, value, mask, cap=self.cap, qk_norm=self.qk_norm
        )
        self.sow("intermediates", "largest_logits", largest)
        return output


def largest_logits(intermediates: Any) -> dict[str, jax.Array]:
    """Return the largest logits of a forward pass, by attention.

    Args:
        intermediates: The collection "intermediates" that `apply` returned.

    Returns:
        From the dotted name of each attention to an array of shape (heads,): what
        `clip_logits` takes as `largest_logits=`. Of several calls of one attention it
        is the largest.

    Raises:
        ValueError: If two attentions have one name.
    """
    found, owners = {}, {}
    for path, largest in jax.tree_util.tree_flatten_with_path(intermediates)[0]:
        names = [getattr(key, "key", None) for key in path]
        if "largest_logits" not in names:
            continue
        owner = path[: names.index("largest_logits")]
        name = _trees.path_name(owner[:-1]) if owner[:-1] else ""
        if owners.setdefault(name, owner) != owner:
            raise ValueError(
                f"two attentions are called {name!r}. Within `@linen.compact` pass "
                "`attention_fn=Attention(parent=None)`: each is then named after its "
                "layer."
            )
        found[name] = jnp.maximum(found[name], largest) if name in found else largest
    return found
