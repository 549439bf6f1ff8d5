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
    """The Euclidean norm, rank-0 float32."""
    return jnp.sqrt(dot(tree, tree))


def moved(point, rate, direction):
    """`point + rate * direction`, in the dtypes of `point`."""
    return jax.tree.map(
        lambda x, u: x + rate.astype(x.dtype) * u.astype(x.dtype), point, direction
    )
