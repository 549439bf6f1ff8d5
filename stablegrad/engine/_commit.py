"""The commit: run the inner optimizer once, and write what is finite.

    u, S' = inner(s g, S);    theta' = theta + k u  where finite, else theta

An element of the parameters or of the inner state that was finite and would no longer
be is kept as it was, and counted. On an accelerator this fuses into the optimizer's own
kernels. On a CPU, a mask on the inner state and a count cost more than the step. There,
large trees of float32 leaves have only their parameters masked, and `is_checked` steps
are inspected before they are written: a step that would break the inner state is held.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _checks, _trees
from .._mapped_axes import manual_axes, varies_over, varying
from .._norms import Measurement
from .._platform import cond_on_cpu, on_cpu
from .._scales import Scales, scale_leaves
from ..responses._reasons import Reason, first_reason
from ._decide import StepContext

SMALL = 65_536  # Elements up to which every step is checked on a CPU, too.
FIRST_CHECKED = 8  # Steps at the start that are checked.
CHECK_EVERY = 256  # Steps from one check to the next after that.
UNUSUAL = 1e12  # A leaf norm above which a step is checked.

Inner = Callable[[Any, Any, Any], tuple[Any, Any]]  # updates, state, params


class Committed(NamedTuple):
    """The results of a step that was taken, or held back."""

    result: Any  # Updates or parameters, whichever the caller asked for.
    inner_state: Any
    # int32 (leaves + 1,): elements kept out, and at last those of no parameter's leaf.
    kept_out: jax.Array
    reason: jax.Array  # int32: why the step was held back, 0 if it was taken.


def commit(
    inner: Inner,
    step: StepContext,
    inner_state: Any,
    scales: tuple[Scales | None, Scales | None],
    reason: jax.Array,
    is_checked: jax.Array,
    writes_params: bool,
) -> Committed:
    """Take the step if there is no reason against it, else leave everything as it was.

    `scales` are those of the gradient and of the update. `writes_params` says whether
    the result is the parameters, or the updates.
    """
    operands = (step.updates, inner_state, step.params)
    counted = _trees.inexact_flags(step.like)
    shapes = [np.shape(leaf) for leaf in _trees.inexact_leaves(step.like)]
    owners = _owners(inner_state, step.like)
    trusts = jnp.zeros((), bool)
    if not always_checked(step.like, inner_state):
        trusts = on_cpu()

    def run(updates, inner_state, params):
        gradient = _scaled(updates, scales[0], step.like)
        update, new_state = inner(gradient, inner_state, params)
        _checks.same_state(inner_state, new_state)
        return _scaled(update, scales[1], step.like), new_state

    def write(accepted, masks_state, updates, inner_state, params) -> Committed:
        update, new_state = run(updates, inner_state, params)
        writer = _Writer(accepted, shapes)
        if writes_params:
            result = _write_params(writer, params, update, counted)
        else:
            result = _write_updates(writer, params, update, counted)
        new_state = _write_state(writer, new_state, inner_state, owners, masks_state)
        return Committed(result, new_state, writer.counts(), reason)

    def inspect(updates, inner_state, params):
        """Count what the parameters would not take; tell whether the state breaks."""
        update, new_state = run(updates, inner_state, params)
        writer = _Writer(jnp.ones((), bool), shapes)
        _write_updates(writer, params, update, counted)
        pairs = zip(
            jax.tree.leaves(new_state), jax.tree.leaves(inner_state), strict=True
        )
        for (after, before), owner in zip(pairs, owners, strict=True):
            if _trees.is_inexact(before):
                writer.watch(_broken(after, before), owner)
        return writer.inspected()

    kept_out = jnp.zeros((len(shapes) + 1,), jnp.int32)
    if not always_checked(step.like, inner_state):
        kept_out, breaks = lax.cond(
            (reason == 0) & is_checked & trusts,
            inspect,
            lambda *_: (kept_out, jnp.zeros((), bool)),
            *operands,
        )
        broken = jnp.where(breaks, jnp.int32(Reason.NONFINITE_STATE), 0)
        reason = first_reason((reason, broken))

    def take(updates, inner_state, params) -> Committed:
        accepted = (reason == 0) | on_cpu()
        done = write(accepted, ~trusts, updates, inner_state, params)
        # A constant on either platform, which removes the counts from a CPU's program.
        found = jnp.where(trusts, kept_out, done.kept_out)
        found = jnp.where(reason == 0, found, 0)  # Nothing of a rejected step.
        return done._replace(kept_out=found, reason=reason)

    def hold(updates, inner_state, params) -> Committed:
        result = params
        if not writes_params:
            structs, _ = jax.eval_shape(run, *operands)
            result = jax.tree.map(
                lambda leaf, struct: jnp.zeros_like(leaf, struct.dtype),
                updates,
                structs,
            )
        held = Committed(result, inner_state, jnp.zeros_like(kept_out), reason)
        if not manual_axes():
            return held
        structs = jax.eval_shape(take, *operands)
        return jax.tree.map(
            lambda leaf, struct: varying(jnp.asarray(leaf), varies_over(struct)),
            held,
            structs,
        )

    return cond_on_cpu(reason == 0, take, hold, *operands)


def always_checked(like, inner_state) -> bool:
    """Return whether a CPU checks every step: small trees, and narrow dtypes."""
    leaves = _trees.inexact_leaves((like, inner_state))
    narrow = any(jnp.finfo(leaf.dtype).bits < 32 for leaf in leaves)
    return narrow or sum(leaf.size for leaf in _trees.inexact_leaves(like)) <= SMALL


def checked_now(gradient: Measurement, steps, kept_out) -> jax.Array:
    """Return whether a CPU checks this step of a large tree of float32 leaves."""
    largest = jnp.max(gradient.leaf_squares, initial=0.0)
    due = (steps < FIRST_CHECKED) | (steps % CHECK_EVERY == 0)
    return due | (kept_out > 0) | ~(largest < UNUSUAL**2)


def _scaled(tree, scales: Scales | None, like):
    return tree if scales is None else scale_leaves(tree, scales, like)


class _Writer:
    """Writes new arrays over old ones where a step is accepted and elements are finite.

    It adds up what it keeps out, by the leaf of the parameters that an array belongs
    to. Flags of one leaf are joined before they are counted, so that XLA counts them in
    the kernel that computes the arrays.
    """

    def __init__(self, accepted: jax.Array, shapes: list[tuple[int, ...]]):
        self._accepted = accepted
        self._shapes = shapes
        self._flags: dict[int, jax.Array] = {}
        self._broken: dict[int, jax.Array] = {}
        self._others: list[jax.Array] = []

    def write(self, new, old, bad=None, owner: int | None = None) -> jax.Array:
        """Return `new`, or `old` where the step is rejected or `bad` is set."""
        new, old = jnp.asarray(new), jnp.asarray(old)
        if new.dtype != old.dtype:
            new = new.astype(old.dtype)
        if bad is None:
            return jnp.where(self._accepted, new, old)
        if owner is not None and bad.shape == self._shapes[owner]:
            self._flags[owner] = self._flags.get(owner, False) | bad
        else:
            self._others.append(jnp.sum(bad, dtype=jnp.int32))
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
        """Return the elements kept out: int32 (leaves + 1,), others at last."""
        none = jnp.zeros((), jnp.int32)
        rows = [
            jnp.sum(self._flags[i], dtype=jnp.int32) if i in self._flags else none
            for i in range(len(self._shapes))
        ]
        return jnp.stack([*rows, sum(self._others, none)])


def _write_params(writer: _Writer, params, update, counted: list[bool]):
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
            written.append(writer.write(moved, param, bad, next(owner)))
        else:
            written.append(writer.write(moved, param))
    return structure.unflatten(written)


def _write_updates(writer: _Writer, params, update, counted: list[bool]):
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
            written.append(writer.write(change, zero, bad, next(owner)))
        else:
            written.append(writer.write(change, zero))
    return structure.unflatten(written)


def _write_state(writer: _Writer, new, old, owners: list[int | None], masks):
    """Return the inner optimizer's new state, masked if `masks` is set."""
    written = []
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), owners, strict=True)
    for after, before, owner in pairs:
        bad = None
        if _trees.is_inexact(before):
            bad = _broken(after, before) & masks
        written.append(writer.write(after, before, bad, owner))
    return jax.tree.structure(old).unflatten(written)


def _broken(after, before) -> jax.Array:
    # A state may hold an inf on purpose, such as the best loss so far.
    return ~jnp.isfinite(after) & jnp.isfinite(before)


def _owners(inner_state, like) -> list[int | None]:
    """Return, for each leaf of the state, the leaf of the parameters it belongs to."""
    structure = jax.tree.structure(like)
    counted = _trees.inexact_flags(like)
    places = [sum(counted[:i]) if own else None for i, own in enumerate(counted)]
    is_like_params = lambda node: jax.tree.structure(node) == structure
    owners: list[int | None] = []
    for node in jax.tree.leaves(inner_state, is_leaf=is_like_params):
        owners += places if is_like_params(node) else [None]
    return owners
