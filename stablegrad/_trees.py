"""Pytrees of arrays: which leaves count, what they are called, scaling, selecting."""

import jax
import jax.numpy as jnp
import numpy as np


def is_inexact(leaf) -> bool:
    """Whether a leaf is real or complex floating point; others pass untouched."""
    return jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact)


def inexact_leaves(tree, like=None) -> list[jax.Array]:
    """The floating-point leaves, in the order of `jax.tree.leaves`.

    With `like`, a tree of the same structure, its leaves say which count: an optimizer
    may turn an integer leaf's zero gradient into a float.
    """
    judged = tree if like is None else like
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(judged), strict=True)
    return [jnp.asarray(leaf) for leaf, judge in pairs if is_inexact(judge)]


def leaf_names(tree) -> tuple[str, ...]:
    """Dotted names of the leaves of `inexact_leaves`, as `layers.0.kernel`.

    Flax NNX hands `init` its variables and `update` their plain arrays; both get one
    name, since a variable's own `.value` is left out.
    """
    names = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if is_inexact(leaf):
            if path and path[-1] == jax.tree_util.GetAttrKey("value"):
                path = path[:-1]
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            names.append(name or "params")
    return tuple(names)


def scale_leaves(tree, scales, like):
    """Multiplies leaf i by `scales[i]`, or every leaf by a rank-0 `scales`.

    Only leaves that are floating point in `like` count. The product is taken in the
    wider dtype and returned in the leaf's own: one scalar factor a leaf is what XLA
    fuses into the optimizer's kernels.
    """
    leaves, treedef = jax.tree.flatten(tree)
    scaled, index = [], 0
    for leaf, judge in zip(leaves, jax.tree.leaves(like), strict=True):
        if is_inexact(judge):
            leaf = jnp.asarray(leaf)
            scale = scales if scales.ndim == 0 else scales[index]
            wide = np.promote_types(np.float32, leaf.dtype)
            product = scale.astype(wide) * leaf.astype(wide)
            scaled.append(product.astype(leaf.dtype))
            index += 1
        else:
            scaled.append(leaf)
    return treedef.unflatten(scaled)


def select(pred, on_true, on_false):
    """Leafwise `where` with a rank-0 `pred`; keeps the dtypes of `on_false`.

    Selects, never blends: 0 * nan is nan.
    """

    def choose(new, old):
        new, old = jnp.asarray(new), jnp.asarray(old)
        return jnp.where(
            pred, new if new.dtype == old.dtype else new.astype(old.dtype), old
        )

    return jax.tree.map(choose, on_true, on_false)


def strongly_typed(tree):
    """Arrays of fixed dtype for every number, so that a step never retraces."""

    def fix(leaf):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        return jax.lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(fix, tree)


def distinct(tree):
    """The same numbers, each in a buffer of its own, so that a step can donate them."""
    return jax.tree.map(jnp.array, tree)


def zeros(structs):
    """Zeros of the given shapes and dtypes."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), structs)


def layout(names: tuple[str, ...]) -> dict[str, None]:
    """Names as the keys of a dict without arrays, which any checkpoint can hold.

    Numbered, because pytrees order dicts by key.
    """
    width = len(str(len(names)))
    return {f"{i:0{width}d} {name}": None for i, name in enumerate(names)}


def names_in(layout: dict[str, None]) -> tuple[str, ...]:
    """Undoes `layout`."""
    return tuple(key.split(" ", 1)[1] for key in sorted(layout))


def increment(steps) -> jax.Array:
    """`steps + 1`, staying at the dtype's maximum instead of wrapping."""
    return jnp.where(steps < jnp.iinfo(steps.dtype).max, steps + 1, steps)
