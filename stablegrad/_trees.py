"""Pytrees of arrays: which leaves count, their names, selecting."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_array(leaf) -> bool:
    """Return whether a leaf is an array, the shape of one, or a number."""
    if isinstance(leaf, bool | int | float | complex):
        return True
    # A dtype such as `jnp.float32` is a class with both.
    is_shaped = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return is_shaped and not isinstance(leaf, type)


def is_inexact(leaf) -> bool:
    """Return whether a leaf is real or complex floating point."""
    return is_array(leaf) and jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact)


def inexact_leaves(tree, like=None) -> list[jax.Array]:
    """Return the floating-point leaves, in the order of `jax.tree.leaves`.

    With `like`, a tree of the same structure, its leaves say which count: an optimizer
    may turn an integer leaf's zero gradient into a float. Shapes without values, from
    `jax.eval_shape`, stay what they are.
    """
    judged = tree if like is None else like
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(judged), strict=True)
    leaves = [leaf for leaf, judge in pairs if is_inexact(judge)]
    return [x if hasattr(x, "shape") else jnp.asarray(x) for x in leaves]


def inexact_flags(tree) -> list[bool]:
    """Return, for each leaf, whether it is floating point."""
    return [is_inexact(leaf) for leaf in jax.tree.leaves(tree)]


def paths_and_leaves(tree) -> list[tuple[Any, Any]]:
    """Key path and leaf, for the leaves of `inexact_leaves`.

    Flax NNX hands `init` its variables and `update` what they hold; both get one path,
    since a variable's own `.value` is left out.
    """
    flatten = jax.tree_util.tree_flatten_with_path
    return [
        (path + rest, leaf)
        for path, node in flatten(tree, is_leaf=_is_variable)[0]
        for rest, leaf in flatten(_held(node))[0]
        if is_inexact(leaf)
    ]


def path_name(path, separator: str = ".") -> str:
    """Return the dotted name of a key path, as `layers.0.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=separator) or "params"


def leaf_names(tree) -> tuple[str, ...]:
    """Dotted names of the leaves of `inexact_leaves`; `a/b` if `a.b` is not unique."""
    paths = [path for path, _ in paths_and_leaves(tree)]
    names = [path_name(path) for path in paths]
    uses = Counter(names)
    return tuple(
        name if uses[name] == 1 else path_name(path, "/")
        for name, path in zip(names, paths, strict=True)
    )


def shapes_and_dtypes(tree) -> str:
    """Return the structure of a tree with the shape and dtype of each leaf."""

    def name(leaf) -> str:
        if not is_array(leaf):
            return type(leaf).__name__
        return f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"

    return str(jax.tree.map(name, tree))


def require_host(asker: str, tree) -> None:
    """Raise TypeError inside jit, where nothing can be read on the host."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"`{asker}` reads numbers on the host, so it cannot run inside jit. Return "
            f"what it reads from the compiled function, and call `{asker}` outside."
        )


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
    """Return arrays of fixed dtype for every number, so that a step never retraces."""

    def fix(leaf):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        return jax.lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(fix, tree)


def distinct(tree):
    """Copy every array, so that each has a buffer of its own and can be donated."""
    return jax.tree.map(jnp.array, tree)


def floating_like(updates, like):
    """Return the updates with floats for integers where `like` has floats.

    Raises ValueError if the shapes of a leaf differ.
    """

    def convert(path, update, judge):
        if is_array(update) and is_array(judge) and np.shape(update) != np.shape(judge):
            raise ValueError(
                f"the gradient of the leaf {path_name(path)} has shape "
                f"{np.shape(update)}, and the parameter {np.shape(judge)}. Gradients "
                "by example, as for `optax.contrib.dpsgd`, go through "
                "`differentially_private_aggregate` before the guard."
            )
        if is_inexact(judge) and not is_inexact(update):
            return jnp.asarray(update).astype(jnp.result_type(judge))
        return update

    return jax.tree_util.tree_map_with_path(convert, updates, like)


def nodes(tree, wanted: Callable[[Any], bool]) -> list[Any]:
    """Return the outermost nodes of a tree that are `wanted`."""
    return [node for node in jax.tree.leaves(tree, is_leaf=wanted) if wanted(node)]


def without_variables(tree):
    """Replace every variable of Flax NNX by what it holds."""
    return jax.tree.map(_held, tree, is_leaf=_is_variable)


def _is_variable(node) -> bool:
    return any(kind.__name__ == "Variable" for kind in type(node).__mro__)


def _held(node):
    """Return what a variable of Flax NNX holds; of anything else, itself."""
    if not _is_variable(node):
        return node
    (held,) = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    return held


def layout(names: tuple[str, ...]) -> dict[str, None]:
    """Return names as the keys of a dict without arrays, which any checkpoint can hold.

    Numbered, because pytrees order dicts by key.
    """
    width = len(str(len(names)))
    return {f"{i:0{width}d} {name}": None for i, name in enumerate(names)}


def names_in(layout: dict[str, None]) -> tuple[str, ...]:
    """Undo `layout`."""
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
    """Return the same numbers in the dtypes of `like`: hyperparameters may be wider."""
    return jax.tree.map(lambda new, old: new.astype(old.dtype), tree, like)


def zero_unless(keep, tree, like):
    """Return the tree, or zeros where the rank-0 `keep` is false; integers stay."""
    return map_inexact(
        lambda leaf: jnp.where(keep, leaf, jnp.zeros((), leaf.dtype)), like, tree
    )


def names_as_bytes(names: tuple[str, ...]) -> bytes:
    """Return names as lines of text."""
    return "\n".join(name.replace("\n", " ") for name in names).encode()


def encode_names(names: tuple[str, ...]) -> jax.Array:
    """Return names as an array of bytes, which a state can hold."""
    return jnp.asarray(np.frombuffer(names_as_bytes(names), np.uint8))


def decode_names(array) -> tuple[str, ...]:
    """Undo `encode_names`; of an ensemble's stacked arrays, read the first."""
    array = np.asarray(array)
    if not array.size:
        return ()
    text = array.reshape(-1, array.shape[-1])[0].tobytes().decode()
    return tuple(text.strip("\0").split("\n")) if text.strip("\0") else ()
