"""From one guard to another: responses added, dropped or put in another order."""

import collections
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _trees
from .._checks import require_optimizer
from .._packing import Packing, on_host
from .._reading import limit_names, search
from ..engine._event_log import CODES, EventLog
from ..engine._layout import VERSION, Rows, State, parts_of, structs_of, version_of
from ..engine._record import Record, carried_extras, record_structs
from ..engine._step import GuardState
from ..engine._unwrap import unwrap
from ..responses.roll_back._machine import RollBackState
from ._adopt import opt_state_of
from ._matching import (
    filled,
    require_on_host,
    require_same_names,
    warn_of_dropped,
)
from ._rebuild import rebuilt, require_finite
from ._watched import watched_layers, watched_steps

ROLL_BACK = "roll_back"
COUNTS = ("steps", "cooldown_left", "restores", "roll_backs")  # Of a `roll_back`.


def migrate(tx: optax.GradientTransformation, params: Any, old: Any) -> Any:
    """Return a state for a guard with other responses, from the state of another.

    Carried over are: the inner optimizer's state; all counts and events; the states of
    responses that both guards have, such as a cut of the learning rate, several of one
    kind in order; and statistics
    of thresholds that both have, by name, signal and granularity, with those of
    `layer_health` if it watches the same signals of the same groups; and the rows of
    `record_norms`. What is new starts as at the start of a run. Snapshots of
    `roll_back` start with the parameters as they are.

    Args:
        tx: The new guarded transformation, around the same optimizer.
        params: The parameters now.
        old: The state to go on from: a guard's, an `nnx.Optimizer` or a `TrainState`
            that holds it, or the dicts and lists that Orbax or Flax restore of one
            without a target. From a version that stored no layout, the inner
            optimizer's state alone is carried over, with a warning.

    Returns:
        A state for `tx`. Arrays of the inner optimizer are those given, not copies.

    Raises:
        TypeError: If `tx` is no optax transformation.
        ValueError: If either holds no guard, or they do not hold as many; if the inner
            optimizer or the parameters are others; if a newer version wrote the state;
            if a parameter is not finite; if `old` is what `nnx.state` had saved and was
            restored without a target, since the names of the numbers are not in it.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> params = {"w": jnp.ones(2)}
        >>> old = sg.guard(optax.adam(1e-3), sg.clip(sg.rarity())).init(params)
        >>> tx = sg.stabilize(optax.adam(1e-3), sg.roll_back())
        >>> state = sg.migrate(tx, params, old)
    """
    require_optimizer("migrate", tx)
    require_on_host("migrate", params, old)
    require_finite("migrate", params)
    fresh = tx.init(params)
    old = _as_guards(_trees.without_variables(opt_state_of(old)))
    guards, wanted = search(old), search(fresh)
    if not guards:
        raise ValueError(
            "`migrate` needs the state of a guard, and there is none in it. For the "
            "state of a bare optimizer, call `stablegrad.adopt(tx, params, state)`."
        )
    if len(guards) != len(wanted):
        raise ValueError(
            f"`migrate` got a state with {len(guards)} guards for an optimizer with "
            f"{len(wanted)}."
        )
    sources = iter(guards)
    given = filled(unwrap(fresh), unwrap(old), "migrate")
    return rebuilt(fresh, given, lambda guard: _carried(next(sources), guard), params)


def _as_guards(tree: Any) -> Any:
    """Return a tree with guards' states for the dicts that Orbax restores of them."""
    is_dict = lambda node: isinstance(node, Mapping) and "guarded_inner" in node

    def convert(node):
        if not is_dict(node):
            return node
        if "columns" not in node:
            raise ValueError(
                "`migrate` got a checkpoint of `nnx.state`, which has no names for the "
                "guard's numbers. Restore it into the optimizer as it was, with the "
                "transformation of then, and migrate from that:\n"
                "  target = nnx.Optimizer(model, old_tx, wrt=nnx.Param)\n"
                "  restored = checkpointer.restore(path, nnx.state(target))\n"
                "  nnx.update(target, restored)\n"
                "  state = sg.migrate(tx, nnx.state(model, nnx.Param), target)"
            )
        known = {name: node[name] for name in GuardState._fields if name in node}
        guard = GuardState(**known)
        # NNX has a dict around each array, Flax's `msgpack_restore` one for the tuple.
        numbers = tuple(map(jnp.asarray, jax.tree.leaves(guard.numbers)))
        (names,) = jax.tree.leaves(guard.names)
        inner = _as_guards(guard.guarded_inner)
        return guard._replace(guarded_inner=inner, numbers=numbers, names=names)

    return jax.tree.map(convert, tree, is_leaf=is_dict)


def _carried(old: GuardState, new: GuardState) -> GuardState:
    """Return the new guard with its numbers, as far as the old one has them."""
    version = version_of(old.layout)
    if version > VERSION:
        raise ValueError(
            f"`migrate` got a state of version {version}; this stablegrad reads "
            f"versions up to {VERSION}. Install a newer one."
        )
    if version < VERSION:
        warnings.warn(
            "the state is of an older version: the inner optimizer's state is carried "
            "over, and counts, events and statistics start anew.",
            stacklevel=2,
        )
        return new
    _, (old_record, old_parts) = _unpacked(old)
    packing, (record, parts) = _unpacked(new)
    kept = old_record._replace(
        **carried_extras((old.columns, old_record), (new.columns, record))
    )
    log = _with_moved(kept.log, "cause", limit_names(old), limit_names(new))
    names = _trees.decode_names(old.names), _trees.decode_names(new.names)
    require_same_names(*names)
    kept = kept._replace(log=_with_moved(log, "leaf", *names))
    found = _known(parts_of(old.layout), old_parts)
    used: collections.Counter[Any] = collections.Counter()
    warn_of_dropped(parts_of(old.layout), parts_of(new.layout))

    def best(key, otherwise):
        """Return the next old arrays of this kind, else `otherwise`.

        Thresholds of one kind share the last: what is usual is the same for all.
        """
        same, place = found.get(key, []), used[key]
        used[key] += 1
        if isinstance(key, Rows):
            place = min(place, len(same) - 1)
        return same[place] if 0 <= place < len(same) else otherwise

    order = _order_of(old, new)

    def reordered(own: Rows, rows: list, fresh: list) -> list:
        """Return rows in the order of the new leaves; other groups start anew."""
        if order is None or own.groups == 1:
            return rows
        if own.groups != len(order):
            return fresh
        return [array[np.asarray(order)] for array in rows]

    filled_parts = []
    for part, arrays in zip(parts_of(new.layout), parts, strict=True):
        if isinstance(part, State):
            same = best(_key_of(part), arrays)
            is_roll_back = part.name == ROLL_BACK
            filled_parts.append(_with_counts(arrays, same) if is_roll_back else same)
            continue
        rows = [
            reordered(own, best(own, own_rows), own_rows)
            for own, own_rows in _split(part, arrays)
        ]
        joined = [jnp.concatenate(leaves) for leaves in zip(*rows, strict=True)]
        filled_parts.append(joined)
    return new._replace(
        numbers=packing.pack((kept, filled_parts)),
        layers=watched_layers(old, new),
        history=watched_steps(old, new),
    )


def _key_of(part: State) -> State | str:
    """Return what a state is carried by; a `roll_back` by name, for any `keep`."""
    return ROLL_BACK if part.name == ROLL_BACK else part


def _with_counts(fresh: list, old: list) -> list:
    """Return the fresh state of a `roll_back` with the counts of an old one.

    Ages and norms are those of its snapshots, which start anew.
    """
    before, now = RollBackState(*old), RollBackState(*fresh)
    return list(now._replace(**{name: getattr(before, name) for name in COUNTS}))


def _order_of(old: GuardState, new: GuardState) -> list[int] | None:
    """Return the old place of each new leaf; None if the leaves are in order."""
    before, now = _trees.decode_names(old.names), _trees.decode_names(new.names)
    return None if before == now else [before.index(name) for name in now]


def _with_moved(log: EventLog, code: str, old: Sequence, new: Sequence) -> EventLog:
    """Return a log in which `code` is a place among the new names, -1 if gone."""
    places = [new.index(name) if name in new else -1 for name in old]
    column = CODES.index(code)
    codes = log.codes[..., column]
    moved = jnp.asarray([*places, -1], jnp.int32)[codes]  # The last is that of -1.
    return log._replace(codes=jnp.asarray(log.codes).at[..., column].set(moved))


def _unpacked(guard: GuardState) -> tuple[Packing, tuple[Record, list[list]]]:
    structs = [structs_of(part) for part in parts_of(guard.layout)]
    packing = Packing((record_structs(guard.columns), structs))
    # They may lie on a mesh that is not in use.
    return packing, packing.unpack(on_host(guard.numbers))


def _known(described, parts) -> dict[State | Rows | str, list]:
    """Return the arrays of each part by what it is, several of a kind in order."""
    found: dict[State | Rows | str, list] = {}
    for part, arrays in zip(described, parts, strict=True):
        if isinstance(part, State):
            found.setdefault(_key_of(part), []).append(arrays)
        else:
            for own, rows in _split(part, arrays):
                found.setdefault(own, []).append(rows)
    return found


def _split(family: list[Rows], arrays: list) -> list[tuple[Rows, list]]:
    """Return the rows of each threshold of a family."""
    start, split = 0, []
    for own in family:
        stop = start + own.groups
        split.append((own, [array[start:stop] for array in arrays]))
        start = stop
    return split
