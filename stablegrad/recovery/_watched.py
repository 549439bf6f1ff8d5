"""What a guard has watched, carried to another: layers, and the last steps."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reading, _trees
from .._packing import on_host
from ..engine._history import SERIES
from ..engine._record import NO_LOSS, totals_of
from ..engine._step import GuardState
from ..responses._layers import LayerNumbers


def watched_layers(old: GuardState, new: GuardState) -> Any:
    """Return the state of `layer_health`: the old one, if it is of the same signals."""
    if not (old.layers and new.layers):
        return new.layers
    layers: Any = old.layers
    if isinstance(layers, Mapping):  # Orbax and Flax restore a dict.
        layers = LayerNumbers(*(layers[name] for name in LayerNumbers._fields))
    previous: Any = layers.previous_gradient
    if isinstance(previous, Mapping):  # Of a list, by number.
        previous = [previous[key] for key in sorted(previous, key=int)]
    columns = layers.signal_columns
    leaves, structure = jax.tree.flatten(new.layers)
    carried = jax.tree.leaves(layers._replace(previous_gradient=previous))
    kinds = lambda arrays: [(x.shape, x.dtype) for x in arrays]
    same = {*columns} == {*new.layers.signal_columns}
    if not same or kinds(carried) != kinds(leaves):
        return new.layers
    return structure.unflatten(carried)


def watched_steps(old: GuardState, new: GuardState) -> Any:
    """Return the rows of `record_norms`: those of the old guard, as far as they go."""
    rows, fresh = (on_host(tuple(jax.tree.leaves(x.history))) for x in (old, new))
    if not (rows and fresh):
        return new.history
    (rows,), (fresh,) = rows, fresh
    names = [_columns(old), _columns(new)]
    known = np.array([name in names[0] for name in names[1]])
    source = [names[0].index(name) if name in names[0] else 0 for name in names[1]]
    carried = jnp.where(known, jnp.asarray(rows)[:, source], NO_LOSS)
    kept = min(len(rows), len(fresh))
    seen = totals_of(_reading.record_of(old)[0]).guarded_steps
    steps = seen - 1 - np.arange(kept)
    before = jnp.asarray(fresh)[steps % len(fresh)]
    taken = jnp.where((steps >= 0)[:, None], carried[steps % len(rows)], before)
    return jnp.asarray(fresh).at[steps % len(fresh)].set(taken)


def _columns(guard: GuardState) -> list[tuple[str, str]]:
    """Return the names of the columns of the rows."""
    leaves = _trees.decode_names(guard.names)
    numbers = (*SERIES, *_reading.limit_names(guard))
    return [*(("leaf", name) for name in leaves), *(("", name) for name in numbers)]
