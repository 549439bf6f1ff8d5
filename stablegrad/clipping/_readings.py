"""What a clip of a chain remembers for its user, and how to find it in a state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _trees
from .._packing import decode, encode


class ClipReadings(NamedTuple):
    """What a clip did, for `metrics`; rank-0, `encode`d so that it stays finite."""

    raw_norm: jax.Array  # float32: L2 norm of what came in.
    clipped_norm: jax.Array  # float32: L2 norm of what went out.
    limit: jax.Array  # float32: the strictest limit that the step met.
    scale: jax.Array  # float32 in [0, 1]: the smallest factor.
    clipped_steps: jax.Array  # int32: steps that were shrunk, since `init`.
    dropped_steps: jax.Array  # int32: steps with a nan or inf, which became zeros.


# Fields of `ClipReadings` that may stand for a nan or an inf.
ENCODED_READINGS = ("raw_norm", "clipped_norm", "limit")


def init_readings(name: str) -> dict[str, ClipReadings]:
    """Nothing seen yet."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    one = jnp.ones((), jnp.float32)
    return {name: ClipReadings(zero, zero, zero, one, none, none)}


def read(
    readings, *, raw, clipped, limit, scale, finite, shrunk=None
) -> dict[str, ClipReadings]:
    """The readings after one step, `shrunk` unless the scale was 1."""
    ((name, before),) = readings.items()
    shrunk = finite & (scale < 1 if shrunk is None else shrunk)
    return {
        name: ClipReadings(
            encode(raw),
            encode(clipped),
            encode(limit),
            jnp.where(jnp.isfinite(scale), scale, 0.0).astype(jnp.float32),
            _trees.count_if(shrunk, before.clipped_steps),
            _trees.count_if(~finite, before.dropped_steps),
        )
    }


def numbers_of_clips(state: Any) -> dict[str, jax.Array]:
    """What every clip inside a state has to tell, as flat scalars."""
    numbers: dict[str, jax.Array] = {}
    counts: dict[str, int] = {}
    for name, readings in _found(state):
        counts[name] = counts.get(name, 0) + 1
        prefix = f"{name}_{counts[name]}" if counts[name] > 1 else name
        for field, number in readings._asdict().items():
            number = decode(number) if field in ENCODED_READINGS else number
            numbers[f"{prefix}_{field}"] = number
    return numbers


def _found(state: Any) -> list[tuple[str, ClipReadings]]:
    """Name and readings of every clip, an outer one before an inner one."""
    found = []
    for node in jax.tree.leaves(state, is_leaf=_is_clip):
        if _is_clip(node):
            ((name, readings),) = node.clip_readings.items()
            # NNX wraps each array in a variable.
            found.append((name, ClipReadings(*jax.tree.leaves(readings))))
            found += _found(getattr(node, "clip_inner", ()))
    return found


def _is_clip(node: Any) -> bool:
    return isinstance(getattr(node, "clip_readings", None), dict)
