"""Pytrees of arrays: which leaves count, what they are called, scaling, selecting."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._mapped_axes import varies_over, varying


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


def paths_and_leaves(tree) -> list[tuple[Any, Any]]:
    """Key path and leaf, for the leaves of `inexact_leaves`.

    Flax NNX hands `init` its variables and `update` their plain arrays; both get one
    path, since a variable's own `.value` is left out.
    """
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if is_inexact(leaf):
            if path and path[-1] == jax.tree_util.GetAttrKey("value"):
                path = path[:-1]
            found.append((path, leaf))
    return found


def path_name(path) -> str:
    """The dotted name of a key path, as `layers.0.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".") or "params"


def leaf_names(tree) -> tuple[str, ...]:
    """Dotted names of the leaves of `inexact_leaves`."""
    return tuple(path_name(path) for path, _ in paths_and_leaves(tree))


def scale_leaves(tree, scales, like, keep=None):
    """Multiplies every leaf by a rank-0 array, or leaf i by `scales[i]`.

    `scales` has rank 0, or shape (leaves,), or is a tuple of what broadcasts to a leaf.

    Only leaves that are floating point in `like` count. The product is taken in the
    wider dtype and returned in the leaf's own: one scalar factor a leaf is what XLA
    fuses into the optimizer's kernels. Where a rank-0 `keep` is given and false, the
    leaves become zeros instead.
    """
    leaves, treedef = jax.tree.flatten(tree)
    scaled, index = [], 0
    per_leaf = isinstance(scales, tuple) or scales.ndim == 1
    for leaf, judge in zip(leaves, jax.tree.leaves(like), strict=True):
        if is_inexact(judge):
            leaf = jnp.asarray(leaf)
            scale: Any = scales[index] if per_leaf else scales
            wide = np.promote_types(np.float32, leaf.dtype)
            product = scale.astype(wide) * leaf.astype(wide)
            product = product.astype(leaf.dtype)
            scaled.append(product if keep is None else jnp.where(keep, product, 0))
            index += 1
        else:
            scaled.append(leaf)
    return treedef.unflatten(scaled)


def smallest(*scales):
    """The smallest of several scales of one tree, leaf by leaf."""
    leaves = [len(scale) for scale in scales if isinstance(scale, tuple)]
    if not leaves:
        return functools.reduce(jnp.minimum, scales)
    per_leaf = [
        scale if isinstance(scale, tuple) or scale.ndim else (scale,) * leaves[0]
        for scale in scales
    ]
    rows = [[scale[i] for scale in per_leaf] for i in range(leaves[0])]
    return tuple(functools.reduce(jnp.minimum, row) for row in rows)


def times(scales, factor):
    """Every scale multiplied by one rank-0 factor."""
    return jax.tree.map(lambda scale: scale * factor, scales)


def least(scales) -> jax.Array:
    """The smallest factor in a tree's scales, 1 if there is none."""
    rows = scales if isinstance(scales, tuple) else (scales,)
    flat = [jnp.ones((1,), jnp.float32), *[jnp.ravel(row) for row in rows]]
    return jnp.min(jnp.concatenate(flat))


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
    """Zeros of the given shapes and dtypes, which vary over the same mapped axes."""
    return jax.tree.map(
        lambda s: varying(jnp.zeros(s.shape, s.dtype), varies_over(s)), structs
    )


def is_stand_in(params) -> bool:
    """Whether this is the object by which `optax.tree.map_params` stands for a tree."""
    structure = jax.tree.structure(params)
    plain = params is None or isinstance(params, (dict, list, tuple))
    return structure.num_leaves == 0 and structure.num_nodes == 1 and not plain


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


def count_if(flag, steps) -> jax.Array:
    """`steps`, one more if `flag`."""
    return jnp.where(flag, increment(steps), steps)


def map_inexact(function, like, *trees):
    """`function` over the leaves that are floating point in `like`; keeps the others.

    The first tree gives the structure, and the leaves that are kept.
    """
    structure = jax.tree.structure(trees[0])
    rows = zip(*[jax.tree.leaves(tree) for tree in trees], strict=True)
    judges = jax.tree.leaves(like)
    done = [
        function(*row) if is_inexact(judge) else row[0]
        for judge, row in zip(judges, rows, strict=True)
    ]
    return structure.unflatten(done)


def cast_like(tree, like):
    """The same numbers in the dtypes of `like`: hyperparameters may be wider."""
    return jax.tree.map(lambda new, old: new.astype(old.dtype), tree, like)


def zero_unless(keep, tree, like):
    """The tree, or zeros where the rank-0 `keep` is false; integers stay."""
    return map_inexact(lambda leaf: jnp.where(keep, leaf, 0), like, tree)
