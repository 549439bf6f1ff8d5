"""Second moments of a gradient, element by element: a clip's own, or an optimizer's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _trees
from ._elements import sizes
from ._readings import ClipNumbers


class MomentState(NamedTuple):
    """State of a clip that compares gradients with a second moment."""

    clip_inner: Any  # State of the inner optimizer.
    clip_moment: Any  # Second moment, like the parameters; () if `inner` has it.
    clip_numbers: ClipNumbers  # Readings and statistics.


def track(moment, updates, decay):
    """Return the moment after one more gradient: d v + (1 - d) |g|^2."""

    def tracked(v, g):
        # Not the square that `measure` adds up, which a CPU would write to memory.
        size = sizes(g)
        return (decay * v + (1 - decay) * size * size).astype(v.dtype)

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
    found = [jnp.sum(v.real, dtype=jnp.float32) / max(v.size, 1) for v in leaves]
    return jnp.stack(found) if found else jnp.zeros((0,), jnp.float32)


def correction(decay, steps) -> jax.Array:
    """Return the factor 1 / (1 - d^k) for a start from zero; zero if k is."""
    weight = 1 - jnp.asarray(decay, jnp.float32) ** steps.astype(jnp.float32)
    return jnp.where(steps > 0, 1 / jnp.maximum(weight, 1e-12), 0.0)


def init(asker: str, optimizer, own: bool, params) -> tuple[Any, Any]:
    """Return the state of an optimizer, and zeros for an `own` moment, else ().

    Raises ValueError if the optimizer must provide the moment and does not have one
    `mu` and one `nu` of all parameters.
    """
    inner = _trees.strongly_typed(optimizer.init(params))
    if own:
        return inner, jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    nodes = _trees.nodes(inner, _has_moments)
    whole = jax.tree.structure(params)
    found = sum(jax.tree.structure(node.nu) == whole for node in nodes)
    if found != 1 or len(nodes) != 1:
        raise ValueError(
            f"`{asker}` needs an `inner` optimizer with one first moment `mu` and one "
            "second moment `nu` of all parameters, such as `optax.adamw(1e-3)`; this "
            f"one has {found}."
        )
    return inner, ()


def second_moment(state):
    return _trees.nodes(state, _has_moments)[0].nu


def cleared(state, *names: str):
    """Return the state with zeros in the named fields beside the moments."""

    def clear(node):
        if not _has_moments(node):
            return node
        old = {name: getattr(node, name) for name in names if hasattr(node, name)}
        return node._replace(**jax.tree.map(jnp.zeros_like, old))

    return jax.tree.map(clear, state, is_leaf=_has_moments)


def _has_moments(node) -> bool:
    return hasattr(node, "mu") and hasattr(node, "nu") and hasattr(node, "_replace")


def warmth(steps, warmup_steps: int) -> jax.Array:
    """Return the factor on updates that grows from 0.01 to 1 along a cosine."""
    phase = steps.astype(jnp.float32) / (warmup_steps + 1)
    rising = 1 - 0.99 * (1 + jnp.cos(jnp.pi * phase)) / 2
    return jnp.where(steps < warmup_steps, rising, 1.0).astype(jnp.float32)
