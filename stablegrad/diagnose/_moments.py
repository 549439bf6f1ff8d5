"""Adam's moments: the constants behind them, and gradients compared with them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _trees

APART = 0.1  # Most that (1 - b2) may be off: rounding at b2 = 0.99999 is 0.01.
MOST_EPSILON = 100.0  # Beyond it an update is like SGD's.


def moments_in(state) -> Any:
    """Return the node of an optimizer state with Adam's moments, or None."""
    is_adam = lambda node: hasattr(node, "mu") and hasattr(node, "nu")
    found = _trees.nodes(state, is_adam)
    return found[0] if found and jax.tree.leaves(found[0].nu) else None


def constants(tx, params) -> jax.Array:
    """Return b1, b2 and epsilon of an Adam-like optimizer, read off what it does.

    Two steps with the same gradient multiply the moments by 1 + b1 and 1 + b2. They are
    nan unless the moments are those of one gradient, its mean and its mean square. The
    update is proportional to g / (|g| + epsilon); two sizes of g give epsilon. Both
    sizes are too small for any clipping. The second step counts, since a warm-up may
    start from a rate of 0; and the leaf with the largest epsilon, since others may be
    frozen.
    """
    wide = lambda p: jnp.promote_types(p.dtype, jnp.float32)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p)), params)
    start = tx.init(zeros)

    def two_steps(size):
        grads = jax.tree.map(lambda p: jnp.full_like(p, size), zeros)
        _, once = tx.update(grads, start, zeros, value=1.0)
        update, twice = tx.update(grads, once, zeros, value=1.0)
        return firsts(update), moments_in(once), moments_in(twice)

    def firsts(tree):
        own = [x.ravel()[0] for x in jax.tree.leaves(tree) if x.size]
        return jnp.stack([x.astype(jnp.float32) for x in own])

    large, one, two = two_steps(1e-4)
    small, *_ = two_steps(1e-6)
    if one is None:
        return jnp.full(3, jnp.nan)
    grown = lambda after, before: firsts(after)[0] / firsts(before)[0] - 1
    ratio = large / small
    epsilon = jnp.maximum(1e-4 * (ratio - 1) / (100.0 - ratio), 0.0)
    epsilon = jnp.max(jnp.where(epsilon < MOST_EPSILON, epsilon, -1.0))
    epsilon = jnp.where(epsilon < 0, jnp.nan, epsilon)
    b1, b2 = grown(two.mu, one.mu), grown(two.nu, one.nu)
    gradient = firsts(one.mu)[0] / (1 - b1)  # As it reaches Adam.
    apart = jnp.abs(firsts(one.nu)[0] / jnp.square(gradient) - (1 - b2))
    known = jnp.stack([b1, b2, epsilon])
    return jnp.where(apart < APART * (1 - b2), known, jnp.nan)


def against_moments(before, after, b2, epsilon):
    """Compare the gradient of each leaf with Adam's epsilon and second moment."""
    below = []
    for _, size, known in _sizes(before, after, b2):
        few = known & (size < epsilon)
        below.append(jnp.where(known.size, _share(few, known), jnp.nan))
    return below, staleness(before, after, b2)


def staleness(before, after, b2) -> list[jax.Array]:
    """Return sqrt(mean(g^2 / v)) of each leaf, nan if it has no moments."""
    found = []
    for square, size, known in _sizes(before, after, b2):
        ratios = jnp.where(known, square / jnp.square(size), 0.0)
        found.append(jnp.where(known.size, jnp.sqrt(_share(ratios, known)), jnp.nan))
    return found


def _share(numbers, known) -> jax.Array:
    return jnp.sum(numbers) / jnp.maximum(jnp.sum(known), 1)


def _sizes(before, after, b2):
    """Return g^2 as Adam sees it, sqrt(v) and where that is known, for each leaf.

    The change of v gives g^2: what stands before Adam in a chain may have scaled g. The
    arrays of a leaf without moments are empty, and so are those of moments of 16 bits,
    whose rounding hides such a change.
    """
    node, last = moments_in(after), moments_in(before)
    if node is None or last is None:
        return []
    masked = lambda x: isinstance(x, optax.MaskedNode)
    nus = [jax.tree.leaves(x.nu, is_leaf=masked) for x in (node, last)]
    count = jnp.asarray(getattr(node, "count", 1), jnp.float32)
    rows = []
    for new, old in zip(*nus, strict=True):
        if masked(new) or new.dtype.itemsize < 4:
            new = old = jnp.zeros(0)
        new, old = new.astype(jnp.float32), old.astype(jnp.float32)
        square = jnp.maximum(new - b2 * old, 0.0) / jnp.maximum(1 - b2, 1e-8)
        nu = new / (1 - b2**count)
        rows.append((square, jnp.where(nu > 0, jnp.sqrt(nu), 1.0), nu > 0))
    return rows
