"""Snapshots: copies of what a healthy step left behind, taken and restored.

Everything runs in `lax.while_loop`s of zero or one iteration. A loop without iterations
passes its arrays on in place, where `lax.cond` would copy them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ... import _trees
from ..._mapped_axes import LOCAL, MappedAxes, varying_like, varying_like_next
from ..._norms import first_true, measure, vanishing_sums
from ..._packing import Packed
from ._machine import (
    NOTHING,
    REPLACE,
    RESTORE,
    SHIFT,
    Exchanged,
    Plan,
    Refusal,
)


class Snapshot(NamedTuple):
    """What a step left behind."""

    params: Any
    # State of the inner transformation; without names while it is kept, since
    # `optax.tree_utils.tree_get` is to find what is in force alone.
    guarded_inner: Any
    statistics: Packed  # Of the thresholds.


class Written(NamedTuple):
    """What a step is about to return."""

    result: Any  # Updates or parameters, whichever the caller asked for.
    guarded_inner: Any
    statistics: Packed


def init_snapshots(first: Snapshot, keep: int, memory: str) -> tuple[Snapshot, ...]:
    """Return `keep` copies of the first snapshot, each with buffers of its own."""
    # Parameters may be shapes alone, as for `optax.adam`.
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    array = lambda x: jnp.zeros(x.shape, x.dtype) if is_shape(x) else x
    first = jax.tree.map(array, unnamed(first))
    copy = lambda: _trees.distinct(_trees.strongly_typed(first))
    return tuple(_put(copy(), memory) for _ in range(keep))


def exchange(
    plan: Plan,
    written: Written,
    kept: tuple[Snapshot, ...],
    params: Any,
    memory: str,
    axes: MappedAxes = LOCAL,
) -> tuple[Written, tuple[Snapshot, ...], Exchanged]:
    """Carry out a plan, or its action `instead` if the step's result is not sound.

    Return what is written, the snapshots, and what was done. `params` are
    those before the step if the result is their update, None if it is the new
    parameters. Where devices of mapped `axes` hold shards, all refuse or none.
    """

    def act(carry):
        written, kept, (action, *_) = carry
        taken = _taken(written, params)
        broken = _broken(taken, axes)
        fine, moments = ~jnp.any(broken), _moments(taken)
        norms = [measure(tree, axes=axes).norm for tree in (taken.params, moments)]
        norms = jnp.stack(norms).astype(jnp.float32)
        grown = (action < RESTORE) & fine & jnp.any(norms > plan.largest_norms)
        poisoned = (action < RESTORE) & ~fine
        action = jnp.where(grown | poisoned, plan.instead, action)
        takes = (action == REPLACE) | (action == SHIFT)
        shift = lambda kept: (kept[0], *kept[:-1])
        kept = _once(takes & (action == SHIFT), shift, kept)
        renew = lambda kept: (_put(_typed_like(taken, kept[0]), memory), *kept[1:])
        kept = _once(takes, renew, kept)
        nothing = poisoned & (action == NOTHING)
        refused = nothing.astype(jnp.int32) * int(Refusal.NO_SNAPSHOT)
        for slot, snapshot in enumerate(kept):
            restore = _restore_from(snapshot, params, axes)
            carry = written, refused
            written, refused = _once(action == RESTORE + slot, restore, carry)
        leaves = len(_trees.inexact_leaves(taken.params))
        leaf = jnp.where(poisoned, first_true(broken[:leaves]), -1)
        return written, kept, Exchanged(action, refused, norms, grown, poisoned, leaf)

    inner = jax.tree.structure(written.guarded_inner)
    kept = _put(kept, memory)  # A checkpoint may have brought them elsewhere.
    kept = tuple(
        own._replace(guarded_inner=inner.unflatten(jax.tree.leaves(own.guarded_inner)))
        for own in kept
    )
    action, zero = plan.action, plan.action * 0
    norms, no = jnp.zeros_like(plan.largest_norms), zero > 0
    idle = Exchanged(action, zero, norms, no, no, zero - 1)
    written, kept, done = _once(action > NOTHING, act, (written, kept, idle))
    return written, tuple(map(unnamed, kept)), done


def unnamed(snapshot: Snapshot) -> Snapshot:
    """Replace named tuples and dicts by tuples, except in trees like the parameters."""
    is_like_params = _is_like(snapshot.params)
    is_named = lambda node: isinstance(node, tuple) or type(node) is dict

    def strip(node):
        if is_like_params(node) or not is_named(node):
            return node
        values = [node[key] for key in sorted(node)] if type(node) is dict else node
        return tuple(map(stripped, values))

    def stripped(tree):
        return jax.tree.map(strip, tree, is_leaf=is_named)

    return snapshot._replace(guarded_inner=stripped(snapshot.guarded_inner))


def _is_like(params: Any) -> Callable[[Any], bool]:
    """Return a test for trees with the parameters' structure, or one array's shape."""
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(params)):
        shape = getattr(params, "shape", ())
        return lambda node: bool(shape) and getattr(node, "shape", ()) == shape
    masked = lambda node: isinstance(node, optax.MaskedNode)
    structure_of = lambda node: jax.tree.structure(node, is_leaf=masked)
    structure = structure_of(params)
    return lambda node: structure_of(node) == structure


def _once(pred: jax.Array, function: Callable, carry):
    """Return `function(carry)` if `pred`, else the carry itself, without a copy."""

    def turn(carry):
        pred, rest = carry
        return pred & False, varying_like(function(rest), rest)

    first = varying_like_next(turn, (pred, carry))
    return lax.while_loop(lambda carry: carry[0], turn, first)[1]


def _taken(written: Written, params) -> Snapshot:
    result = written.result
    if params is not None:
        moved = lambda p, u: jnp.asarray(p + u).astype(jnp.result_type(p))
        result = jax.tree.map(moved, params, result)
    return Snapshot(result, written.guarded_inner, written.statistics)


def _restore_from(snapshot: Snapshot, params, axes: MappedAxes) -> Callable:
    def restore(carry):
        written, _ = carry
        back = _put(snapshot, "device")
        fine = ~jnp.any(_broken(back, axes))
        refused = jnp.where(fine, 0, int(Refusal.NO_SNAPSHOT))
        result = back.params
        if params is not None:
            difference = lambda u, s, p: (s - p).astype(u.dtype)
            trees = written.result, back.params, params
            result = _trees.map_inexact(difference, params, *trees)
            reached = _everywhere(_reachable(back.params, params), axes)
            refused = jnp.where(fine & ~reached, int(Refusal.NEEDS_APPLY), refused)
        restored = Written(result, back.guarded_inner, back.statistics)
        refused = refused.astype(jnp.int32)
        return _trees.select(refused == 0, restored, written), refused

    return restore


def _reachable(snapshot, params) -> jax.Array:
    """Return whether adding s - p to every p gives s within a small error.

    The sum is off by the rounding of s - p, unless s is 0. It is small where no element
    is further from its snapshot than 1 / sqrt(eps) times the largest of the leaf: 2,900
    times in float32, 11 in bfloat16.
    """
    fine = jnp.ones((), bool)
    pairs = zip(
        _trees.inexact_leaves(snapshot), _trees.inexact_leaves(params), strict=True
    )
    for target, current in pairs:
        largest = jnp.max(jnp.abs(target), initial=0)
        farthest = largest * float(jnp.finfo(target.dtype).eps) ** -0.5
        near = (jnp.abs(target - current) <= farthest) | (target == 0)
        fine &= jnp.all(near & jnp.isfinite(current))
    return fine


def _moments(snapshot: Snapshot) -> list:
    """Return what the state holds of the parameters' structure, or of parts of it."""
    return _trees.nodes(snapshot.guarded_inner, _is_like(snapshot.params))


def _broken(snapshot: Snapshot, axes: MappedAxes) -> jax.Array:
    """Return which leaves of the parameters, then of the moments, are not finite.

    A state may hold an inf of its own on purpose, such as the best loss so far.
    """
    leaves = _trees.inexact_leaves((snapshot.params, _moments(snapshot)))
    broken = ~jnp.isfinite(vanishing_sums(leaves))
    return axes.total(broken.astype(jnp.int32)) > 0


def _everywhere(flag: jax.Array, axes: MappedAxes) -> jax.Array:
    return axes.total((~flag).astype(jnp.int32)) == 0


def _typed_like(tree, like):
    """Return the same arrays in the types of `like`, which are never weak."""

    def convert(new, old):
        if jnp.issubdtype(old.dtype, jax.dtypes.extended):
            return new
        return lax.convert_element_type(new, old.dtype)

    return jax.tree.map(convert, tree, like)


def _put(tree, memory: str):
    """Place arrays in a memory; those that are there stay as they are."""
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    space = host if memory == "pinned_host" else device

    def put(leaf):
        there = jax.typeof(leaf).memory_space == space
        return leaf if there else jax.device_put(leaf, space)

    return jax.tree.map(put, tree)
