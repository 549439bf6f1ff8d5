"""Second moments of a gradient, element by element: a yardstick for single elements."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import _trees

# Elements beyond it would square to inf; none of them is normal.
LARGEST_ROOT = 1e18


def zeros(params):
    """A second moment of nothing: float32, shaped like the parameters."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)


def squares(leaf) -> jax.Array:
    """|x|^2 in float32, bounded so that a finite element has a finite square."""
    size = jnp.abs(leaf).astype(jnp.float32)
    return jnp.square(jnp.where(size > LARGEST_ROOT, LARGEST_ROOT, size))


def track(moment, updates, decay):
    """The moment after one more gradient: d v + (1 - d) |g|^2."""
    return _trees.map_inexact(
        lambda v, g: decay * v + (1 - decay) * squares(g), updates, moment, updates
    )


def debiased(moment, decay, steps, like):
    """The moment corrected for its start from zero; zero if `steps` is."""
    weight = 1 - jnp.asarray(decay, jnp.float32) ** steps.astype(jnp.float32)
    scale = jnp.where(steps > 0, 1 / jnp.maximum(weight, 1e-12), 0.0)
    return _trees.map_inexact(lambda v: (scale * v).astype(jnp.float32), like, moment)


def floored(leaf) -> jax.Array:
    """The moment of each element, at least the mean of its leaf: none is ever zero."""
    return jnp.maximum(leaf, jnp.mean(leaf)) if leaf.size else leaf


def shrunk(leaf, bound) -> jax.Array:
    """Each element whose magnitude is above its bound, at the bound; keeps its sign."""
    size = jnp.abs(leaf).astype(np.promote_types(bound.dtype, _real(leaf)))
    factor = jnp.where(size > bound, bound / jnp.where(size > 0, size, 1.0), 1.0)
    return (leaf * factor).astype(leaf.dtype)


def _real(leaf):
    return np.zeros((), leaf.dtype).real.dtype


def clamp(updates, bounds, like):
    """`shrunk` for every leaf that is floating point in `like`."""
    return _trees.map_inexact(shrunk, like, updates, bounds)


def _has_moments(node) -> bool:
    return hasattr(node, "mu") and hasattr(node, "nu") and hasattr(node, "_replace")


def require_moments(asker: str, state, params) -> None:
    """Raises ValueError unless a state has one `mu` and one `nu`, of all parameters."""
    nodes = jax.tree.leaves(state, is_leaf=_has_moments)
    nodes = [node for node in nodes if _has_moments(node)]
    whole = jax.tree.structure(params)
    found = sum(jax.tree.structure(node.nu) == whole for node in nodes)
    if found != 1 or len(nodes) != 1:
        raise ValueError(
            f"`{asker}` needs an `inner` optimizer with one first moment `mu` and one "
            "second moment `nu` of all parameters, such as `optax.adamw(1e-3)`; this "
            f"one has {found}."
        )


def second_moment(state):
    """The second moment of the optimizer whose state this is."""
    nodes = jax.tree.leaves(state, is_leaf=_has_moments)
    return next(node.nu for node in nodes if _has_moments(node))


def cleared(state, *names: str):
    """The state with the named fields, of those beside the moments, at zero."""

    def clear(node):
        if not _has_moments(node):
            return node
        old = {name: getattr(node, name) for name in names if hasattr(node, name)}
        return node._replace(**jax.tree.map(jnp.zeros_like, old))

    return jax.tree.map(clear, state, is_leaf=_has_moments)
