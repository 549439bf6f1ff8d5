"""Pytrees of float32 arrays as vectors."""

import jax
import jax.numpy as jnp


def dot(left, right) -> jax.Array:
    """The inner product, rank-0 float32."""
    products = jax.tree.map(
        lambda x, y: jnp.vdot(x, y, precision="highest").astype(jnp.float32),
        left,
        right,
    )
    return sum(jax.tree.leaves(products), jnp.zeros((), jnp.float32))


def norm(tree) -> jax.Array:
    """The Euclidean norm, rank-0 float32; overflows only if it does itself."""
    peaks = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    peak = jnp.max(jnp.stack([x.astype(jnp.float32) for x in peaks]))
    scaled = divided(tree, peak)
    return jnp.where(peak > 0, peak, 1) * jnp.sqrt(dot(scaled, scaled))


def divided(tree, length):
    """Every leaf divided by a rank-0 `length`, in its own dtype; by 1 if that is 0."""
    length = jnp.where(length > 0, length, 1)
    return jax.tree.map(lambda x: x / length.astype(x.dtype), tree)


def moved(point, rate, direction):
    """`point + rate * direction`, in the dtypes of `point`."""
    return jax.tree.map(
        lambda x, u: x + rate.astype(x.dtype) * u.astype(x.dtype), point, direction
    )
