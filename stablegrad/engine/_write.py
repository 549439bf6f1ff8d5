"""Writing new arrays over old ones, without elements that are not finite."""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from .. import _trees
from .._leaf_sums import leaf_sums
from .._norms import all_finite


class Writer:
    """Write new arrays over old ones where a step is accepted and elements are finite.

    It adds up what it keeps out, by the leaf of the parameters that an array belongs
    to. Of a rejected step, it adds up the parameters that are not finite instead. Flags
    of one leaf are joined and written as bytes, since a GPU is slow at kernels that
    both write arrays and add up.
    """

    def __init__(self, accepted: jax.Array, shapes: list[tuple[int, ...]]):
        self._accepted = accepted
        self._shapes = shapes
        self._flags: dict[int, jax.Array] = {}
        self._broken: dict[int, jax.Array] = {}
        self._others: list[jax.Array] = []

    def write(
        self, new, old, bad=None, owner: int | None = None, param=None
    ) -> jax.Array:
        """Return `new`, or `old` where the step is rejected or `bad` is set.

        `param` is the parameter before the step, if the array is its.
        """
        new, old = jnp.asarray(new), jnp.asarray(old)
        if new.dtype != old.dtype:
            new = new.astype(old.dtype)
        if bad is None:
            return jnp.where(self._accepted, new, old)
        counts = bad & self._accepted
        if param is not None:
            counts |= ~jnp.isfinite(param) & ~self._accepted
        if owner is not None and bad.shape == self._shapes[owner]:
            self._flags[owner] = self._flags.get(owner, False) | counts
        else:
            self._others.append(jnp.sum(counts, dtype=jnp.int32))
        return jnp.where(self._accepted & ~bad, new, old)

    def watch(self, broken, owner: int | None) -> None:
        """Note new elements of the state that are not finite."""
        if owner is not None and broken.shape == self._shapes[owner]:
            self._broken[owner] = self._broken.get(owner, False) | broken
        else:
            self._others.append(jnp.any(broken).astype(jnp.int32))

    def inspected(self) -> tuple[jax.Array, jax.Array]:
        """Return the counts, and whether any watched element is broken.

        One reduction a leaf with two results, which XLA fuses on a CPU, too.
        """
        none = jnp.zeros((), jnp.int32)
        rows, breaks = [none] * len(self._shapes), sum(self._others, none)
        for i, bad in self._flags.items():
            broken = jnp.broadcast_to(self._broken.get(i, False), bad.shape)
            rows[i], found = lax.reduce(
                (bad.astype(jnp.int32), broken.astype(jnp.int32)),
                (none, none),
                lambda left, right: (left[0] + right[0], left[1] | right[1]),
                tuple(range(bad.ndim)),
            )
            breaks |= found
        return jnp.stack([*rows, none]), breaks > 0

    def counts(self) -> jax.Array:
        """Return the elements counted: int32 (leaves + 1,), others at last."""
        flags = [
            lax.optimization_barrier(jnp.asarray(self._flags.get(i, False), jnp.int8))
            for i in range(len(self._shapes))
        ]
        others = sum(self._others, jnp.zeros((), jnp.int32))
        return jnp.append(leaf_sums(flags, jnp.int32), others)


def write_params(writer: Writer, params, update, counted: list[bool]):
    """Add the update to the parameters, as `optax.apply_updates` does."""
    leaves, structure = jax.tree.flatten(params)
    owner = itertools.count()
    written = []
    for param, change, counts in zip(
        leaves, structure.flatten_up_to(update), counted, strict=True
    ):
        moved = jnp.asarray(param + change).astype(jnp.asarray(param).dtype)
        if counts:
            bad = ~jnp.isfinite(moved) & jnp.isfinite(param)
            written.append(writer.write(moved, param, bad, next(owner), param))
        else:
            written.append(writer.write(moved, param))
    return structure.unflatten(written)


def write_updates(writer: Writer, params, update, counted: list[bool]):
    """Return the update, with zeros for what must not be added to the parameters."""
    leaves, structure = jax.tree.flatten(update)
    own = [None] * len(leaves) if params is None else jax.tree.leaves(params)
    owner = itertools.count()
    written = []
    for change, param, counts in zip(leaves, own, counted, strict=True):
        change = jnp.asarray(change)
        zero = jnp.zeros_like(change)
        if counts:
            bad = ~jnp.isfinite(change)
            if param is not None and jnp.finfo(jnp.result_type(param)).bits < 32:
                bad |= ~jnp.isfinite((param + change).astype(jnp.result_type(param)))
            written.append(writer.write(change, zero, bad, next(owner), param))
        else:
            written.append(writer.write(change, zero))
    return structure.unflatten(written)


def write_state(writer: Writer, new, old, owners: list[int | None], masks):
    """Return the inner optimizer's new state, masked if `masks` is set."""
    written = []
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), owners, strict=True)
    for after, before, owner in pairs:
        bad = None
        if _trees.is_inexact(before):
            bad = newly_broken(after, before) & masks
        written.append(writer.write(after, before, bad, owner))
    return jax.tree.structure(old).unflatten(written)


def broken_parameters(params, like) -> jax.Array:
    """Return 1 for each leaf that is not all finite, else 0: int32 (leaves + 1,)."""
    leaves = [] if params is None else _trees.inexact_leaves(params, like)
    none = jnp.zeros((), jnp.int32)
    rows = [(~all_finite(leaf)).astype(jnp.int32) for leaf in leaves]
    missing = len(_trees.inexact_leaves(like)) - len(rows)
    return jnp.stack([*rows, *[none] * missing, none])


def newly_broken(after, before) -> jax.Array:
    # A state may hold an inf on purpose, such as the best loss so far.
    return ~jnp.isfinite(after) & jnp.isfinite(before)


def owners_of(inner_state, like) -> list[int | None]:
    """Return, for each leaf of the state, the leaf of the parameters it belongs to."""
    structure = jax.tree.structure(like)
    counted = _trees.inexact_flags(like)
    places = [sum(counted[:i]) if own else None for i, own in enumerate(counted)]
    is_like_params = lambda node: jax.tree.structure(node) == structure
    owners: list[int | None] = []
    for node in jax.tree.leaves(inner_state, is_leaf=is_like_params):
        owners += places if is_like_params(node) else [None]
    return owners
