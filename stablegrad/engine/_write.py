"""Writing new arrays over old ones, without elements that are not finite."""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from .. import _trees
from .._leaf_sums import leaf_sums
from .._norms import vanishing_sums


class Tally:
    """Counts flags of elements, by the leaf of the parameters that they belong to.

    Flags of one leaf are joined and written as bytes before they are added up, since a
    GPU is slow at kernels that both write arrays and add up.
    """

    def __init__(self, leaves: list):
        """Count for the floating-point leaves of the parameters."""
        self._leaves = leaves
        self._flags: dict[int, jax.Array] = {}
        self._others: list[jax.Array] = []

    def add(self, flags: jax.Array, owner: int | None) -> None:
        """Add an array of flags, which belongs to the leaf `owner` or to none."""
        if owner is None or flags.shape != self._leaves[owner].shape:
            self._others.append(jnp.sum(flags, dtype=jnp.int32))
        elif owner in self._flags:
            self._flags[owner] = lax.bitwise_or(self._flags[owner], flags)
        else:
            self._flags[owner] = flags

    def joined(self) -> list[jax.Array]:
        """Return the flags of each leaf."""
        found = self._flags
        return [
            found[i] if i in found else lax.full_like(leaf, False, bool)
            for i, leaf in enumerate(self._leaves)
        ]

    def others(self) -> jax.Array:
        """Count the flags that belong to no leaf, int32 ()."""
        return sum(self._others, jnp.zeros((), jnp.int32))

    def counts(self, accepted: jax.Array, params: list | None) -> jax.Array:
        """Return the count of each leaf, the others last: int32 (leaves + 1,).

        If the step is not `accepted`, count parameters that are not finite instead.
        """
        flags, others = self.joined(), self.others()
        broken = [~finite(leaf) for leaf in params] if params else [None] * len(flags)
        chosen = [
            lax.select(accepted, own, jnp.zeros_like(own) if other is None else other)
            for own, other in zip(flags, broken, strict=True)
        ]
        written = [lax.optimization_barrier(own.astype(jnp.int8)) for own in chosen]
        return jnp.append(leaf_sums(written, jnp.int32), jnp.where(accepted, others, 0))


def tally_result(tally: Tally, params, update, counted: list[bool], writes_params):
    """Return the structure and leaves of the result: new parameters, or updates.

    A leaf is `(new, old, flags)`. Elements with a flag keep `old`, and so does the
    whole leaf if the step is not accepted.
    """
    changes, structure = jax.tree.flatten(update)
    own = [None] * len(changes) if params is None else jax.tree.leaves(params)
    if writes_params:
        structure = jax.tree.structure(params)
    judge = _new_parameter if writes_params else _new_update
    owner, written = itertools.count(), []
    for change, param, counts in zip(changes, own, counted, strict=True):
        new, old, flags = judge(change, param, counts)
        if flags is not None:
            tally.add(flags, next(owner))
        written.append((new, old, flags))
    return structure, written


def _new_parameter(change, param, counts: bool):
    """Add the update to a parameter, as `optax.apply_updates` does."""
    param = jnp.asarray(param)
    moved = jnp.asarray(param + change).astype(param.dtype)
    return moved, param, newly_broken(moved, param) if counts else None


def _new_update(change, param, counts: bool):
    """Keep an update, unless it breaks itself or a parameter of a narrow dtype."""
    change = jnp.asarray(change)
    flags = None
    if counts:
        flags = ~finite(change)
        if param is not None and jnp.finfo(jnp.result_type(param)).bits < 32:
            flags |= ~finite((param + change).astype(jnp.result_type(param)))
    return change, jnp.zeros_like(change), flags


def tally_state(tally: Tally, new, old, owners: list[int | None], masks=None):
    """Return the inner optimizer's new state as `(new, old, flags)` for each leaf.

    Without `masks`, a rank-0 flag, nothing of the state is kept out.
    """
    written = []
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), owners, strict=True)
    for after, before, owner in pairs:
        flags = None
        if _trees.is_inexact(before):
            flags = newly_broken(after, before)
            if masks is not None:
                flags = lax.select(masks, flags, jnp.zeros_like(flags))
            tally.add(flags, owner)
        written.append((after, before, flags))
    return jax.tree.structure(old), written


def write(accepted: jax.Array, structure, written: list):
    """Return the tree of new arrays where accepted, without flagged elements."""

    def chosen(new, old, flags):
        new, old = jnp.asarray(new), jnp.asarray(old)
        if new.dtype != old.dtype:
            new = new.astype(old.dtype)
        if flags is not None:
            new = lax.select(flags, old, new)
        return lax.select(accepted, new, old)

    return structure.unflatten([chosen(*row) for row in written])


def inspected(result: Tally, state: Tally) -> tuple[jax.Array, jax.Array]:
    """Return counts of elements of the result, and whether the state would break.

    One reduction a leaf with two results, which XLA fuses on a CPU, too.
    """
    none = jnp.zeros((), jnp.int32)
    rows, breaks = [], state.others()
    for bad, broken in zip(result.joined(), state.joined(), strict=True):
        count, found = lax.reduce(
            (bad.astype(jnp.int32), broken.astype(jnp.int32)),
            (none, none),
            lambda left, right: (left[0] + right[0], left[1] | right[1]),
            tuple(range(bad.ndim)),
        )
        rows.append(count)
        breaks |= found
    return jnp.stack([*rows, none]), breaks > 0


def broken_parameters(params, like) -> jax.Array:
    """Return 1 for each leaf that is not all finite, else 0: int32 (leaves + 1,)."""
    leaves = [] if params is None else _trees.inexact_leaves(params, like)
    broken = ~jnp.isfinite(vanishing_sums(leaves))
    missing = len(_trees.inexact_leaves(like)) - len(leaves)
    return jnp.pad(broken.astype(jnp.int32), (0, missing + 1))


def newly_broken(after, before) -> jax.Array:
    # A state may hold an inf on purpose, such as the best loss so far.
    return lax.bitwise_and(lax.bitwise_not(finite(after)), finite(before))


def finite(array) -> jax.Array:
    """Return which elements are finite."""
    array = jnp.asarray(array)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return lax.is_finite(array)
    return jnp.isfinite(array)


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
