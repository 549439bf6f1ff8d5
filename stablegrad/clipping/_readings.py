"""Numbers of a clip in a chain: its readings for `metrics`, before its statistics.

All are packed in one float32 and one int32 array, under the name of the clip. The
readings come first, so that `metrics` finds them without the rest of the layout.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _trees
from .._packing import Packed, Packing, decode, encode, on_host

ClipNumbers = dict[str, Packed]  # One entry, under the name of the clip.


# Fields of the readings; all are rank-0.
NUMBERS = (
    "raw_norm",  # L2 norm of the gradient before clipping.
    "clipped_norm",  # L2 norm of the gradient after clipping.
    "limit",  # The strictest limit in force at the step.
    "scale",  # In [0, 1]: the smallest factor.
)
COUNTS = (
    "clipped_steps",  # Steps that were shrunk, since `init`.
    "dropped_steps",  # Steps that were not finite, since `init`.
)


class ClipReadings(NamedTuple):
    """Readings as vectors: counts that are counted up at once cost no copy."""

    numbers: jax.Array  # float32 (4,): NUMBERS, `encode`d so that they stay finite.
    counts: jax.Array  # int32 (2,): COUNTS.


def init_readings() -> ClipReadings:
    numbers = jnp.asarray([0, 0, 0, 1], jnp.float32)
    return ClipReadings(numbers, jnp.zeros((2,), jnp.int32))


_READINGS = Packing(jax.eval_shape(init_readings))


def next_readings(before: ClipReadings, numbers, finite, shrunk) -> ClipReadings:
    """Return the readings after a step, from its numbers and its two flags."""
    *norms, scale = numbers
    scale = jnp.where(jnp.isfinite(scale), scale, 0.0).astype(jnp.float32)
    flags = jnp.stack([finite & shrunk, ~finite])
    return ClipReadings(
        jnp.stack([*map(encode, norms), scale]), _trees.count_if(flags, before.counts)
    )


def numbers_of_clips(state: Any) -> dict[str, jax.Array]:
    """Return the readings of every clip inside a state, as flat scalars."""
    found: dict[str, jax.Array] = {}
    for prefix, (numbers, counts) in numbered(_found(state)):
        for i, field in enumerate(NUMBERS):
            found[f"{prefix}_{field}"] = decode(numbers[..., i])
        for i, field in enumerate(COUNTS):
            found[f"{prefix}_{field}"] = counts[..., i]
    return found


def numbered(found: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield what was found with its name, and `name_2` for a second of that name."""
    counts: collections.Counter[str] = collections.Counter()
    for name, readings in found:
        counts[name] += 1
        yield f"{name}_{counts[name]}" if counts[name] > 1 else name, readings


def _found(state: Any) -> list[tuple[str, ClipReadings]]:
    """Return name and readings of every clip, an outer one before an inner one."""
    found = []
    is_clip = lambda node: isinstance(getattr(node, "clip_numbers", None), dict)
    for node in _trees.nodes(state, is_clip):
        ((name, packed),) = node.clip_numbers.items()
        found.append((name, _READINGS.unpack(on_host(packed))))
        found += _found(getattr(node, "clip_inner", ()))
    return found
