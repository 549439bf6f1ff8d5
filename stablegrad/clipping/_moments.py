"""Second moments of a gradient, element by element: a clip's own, or an optimizer's."""

from typing import Any

import jax
import jax.numpy as jnp

from .. import _trees
from ._elements import squares


def track(moment, updates, decay):
    """Return the moment after one more gradient: d v + (1 - d) |g|^2."""

    def tracked(v, g):
        return (decay * v + (1 - decay) * squares(g)).astype(v.dtype)

    return _trees.map_inexact(tracked, updates, moment, updates)


def track_means(means, leaf_squares, decay, like) -> jax.Array:
    """Return the mean of each leaf's moment after `track`, float32 (leaves,).

    It follows from the sums of squares alone, without a pass over the moment.
    """
    sizes = [max(leaf.size, 1) for leaf in _trees.inexact_leaves(like)]
    latest = leaf_squares / jnp.asarray(sizes, jnp.float32)
    return decay * means + (1 - decay) * latest


def means(moment, like) -> jax.Array:
    """Return the mean of each leaf that is floating point in `like`."""
    leaves = _trees.inexact_leaves(moment, like)
    found = [jnp.sum(v, dtype=jnp.float32) / max(v.size, 1) for v in leaves]
    return jnp.stack(found) if found else jnp.zeros((0,), jnp.float32)


def correction(decay, steps) -> jax.Array:
    """Return the factor 1 / (1 - d^k) for a start from zero; zero if k is."""
    weight = 1 - jnp.asarray(decay, jnp.float32) ** steps.astype(jnp.float32)
    return jnp.where(steps > 0, 1 / jnp.maximum(weight, 1e-12), 0.0)


def init(asker: str, optimizer, own: bool, params) -> tuple[Any, Any]:
    """Return the state of an optimizer, and zeros for a moment of one's `own` or ().

    Raises ValueError if the optimizer is to provide the moment and has none.
    """
    inner = _trees.strongly_typed(optimizer.init(params))
    if not own:
        require_moments(asker, inner, params)
        return inner, ()
    return inner, jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)


def _has_moments(node) -> bool:
    return hasattr(node, "mu") and hasattr(node, "nu") and hasattr(node, "_replace")


def require_moments(asker: str, state, params) -> None:
    """Raise ValueError unless a state has one `mu` and one `nu`, of all parameters."""
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
    """Return the second moment in the state of an optimizer."""
    nodes = jax.tree.leaves(state, is_leaf=_has_moments)
    return next(node.nu for node in nodes if _has_moments(node))


def cleared(state, *names: str):
    """Return the state with zeros in the named fields beside the moments."""

    def clear(node):
        if not _has_moments(node):
            return node
        old = {name: getattr(node, name) for name in names if hasattr(node, name)}
        return node._replace(**jax.tree.map(jnp.zeros_like, old))

    return jax.tree.map(clear, state, is_leaf=_has_moments)


def warmth(steps, warmup_steps: int) -> jax.Array:
    """Return the factor on updates that grows from 0.01 to 1 along a cosine."""
    phase = steps.astype(jnp.float32) / (warmup_steps + 1)
    rising = 1 - 0.99 * (1 + jnp.cos(jnp.pi * phase)) / 2
    return jnp.where(steps < warmup_steps, rising, 1.0).astype(jnp.float32)
