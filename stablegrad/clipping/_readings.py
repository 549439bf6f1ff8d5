"""Numbers of a clip in a chain: its readings for `metrics`, before its statistics.

All are packed in one float32 and one int32 array, under the name of the clip. The
readings come first, so that `metrics` finds them without the rest of the layout.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _trees
from .._packing import Packed, Packing, decode, encode, on_host

ClipNumbers = dict[str, Packed]  # One entry, under the name of the clip.


class ClipReadings(NamedTuple):
    """The readings of a clip; rank-0, `encode`d so that they stay finite."""

    raw_norm: jax.Array  # float32: L2 norm of the gradient before clipping.
    clipped_norm: jax.Array  # float32: L2 norm of the gradient after clipping.
    limit: jax.Array  # float32: the strictest limit in force at the step.
    scale: jax.Array  # float32 in [0, 1]: the smallest factor.
    clipped_steps: jax.Array  # int32: steps that were shrunk, since `init`.
    dropped_steps: jax.Array  # int32: steps that were not finite, since `init`.


# Fields of `ClipReadings` that may stand for a nan or an inf.
ENCODED_READINGS = ("raw_norm", "clipped_norm", "limit")


class PackableReadings(NamedTuple):
    """Readings as vectors: counts that are counted up at once cost no copy."""

    numbers: jax.Array  # float32 (4,): the other fields.
    counts: jax.Array  # int32 (2,)


def init_readings() -> PackableReadings:
    """Return the readings before the first step."""
    ones = jnp.asarray([0, 0, 0, 1], jnp.float32)
    return PackableReadings(ones, jnp.zeros((2,), jnp.int32))


_READINGS = Packing(jax.eval_shape(init_readings))


def next_readings(
    before: PackableReadings, raw, clipped, limit, scale, finite, shrunk
) -> PackableReadings:
    """Return the readings after a step, which is counted if it is `shrunk`."""
    scale = jnp.where(jnp.isfinite(scale), scale, 0.0).astype(jnp.float32)
    flags = jnp.stack([finite & shrunk, ~finite])
    return PackableReadings(
        jnp.stack([encode(raw), encode(clipped), encode(limit), scale]),
        _trees.count_if(flags, before.counts),
    )


def numbers_of_clips(state: Any) -> dict[str, jax.Array]:
    """Return the readings of every clip inside a state, as flat scalars."""
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
    """Return name and readings of every clip, an outer one before an inner one."""
    found = []
    for node in jax.tree.leaves(state, is_leaf=_is_clip):
        if _is_clip(node):
            ((name, packed),) = node.clip_numbers.items()
            numbers, counts = _READINGS.unpack(on_host(packed))
            fields = [numbers[..., i] for i in range(4)]
            fields += [counts[..., i] for i in range(2)]
            found.append((name, ClipReadings(*fields)))
            found += _found(getattr(node, "clip_inner", ()))
    return found


def _is_clip(node: Any) -> bool:
    return isinstance(getattr(node, "clip_numbers", None), dict)
