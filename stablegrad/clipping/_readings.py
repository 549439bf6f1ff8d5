"""Numbers of a clip in a chain: its readings for `metrics`, and its own statistics.

All of them are packed in one float32 and one int32 array, under the name of the clip.
The readings come first, so that `metrics` finds them without the rest of the layout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .. import _trees
from .._packing import Packed, Packing, decode, encode

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


class _Packable(NamedTuple):
    """The fields of `ClipReadings` as vectors: XLA updates each in place."""

    numbers: jax.Array  # float32 (4,): the other fields.
    counts: jax.Array  # int32 (2,)


def _init_readings() -> _Packable:
    return _Packable(jnp.asarray([0, 0, 0, 1], jnp.float32), jnp.zeros((2,), jnp.int32))


_READINGS = Packing(jax.eval_shape(_init_readings))


class ClipRecord:
    """Packs the readings of a clip together with its statistics."""

    def __init__(self, name: str, init: Callable[[Any], Any] = lambda tree: ()):
        """Take a name, and what returns the statistics before the first step.

        `init` is given the parameters or the updates: the layout depends on their
        structure, shapes and dtypes alone.
        """
        self._name = name
        self._init = init

    def init(self, params) -> ClipNumbers:
        """Return the numbers before the first step."""
        start = self._start(params)
        return {self._name: Packing(start).pack(start)}

    def statistics(self, numbers: ClipNumbers, updates) -> Any:
        """Return the statistics of the clip."""
        return self._packing(updates).unpack(numbers[self._name])[1]

    def after_step(
        self,
        numbers: ClipNumbers,
        updates,
        statistics,
        *,
        raw,
        clipped,
        limit,
        scale,
        finite,
        shrunk=None,
    ) -> ClipNumbers:
        """Return the numbers after one step, with new statistics.

        The step counts as clipped if it is finite and `shrunk`, which by default means
        that the scale is below 1.
        """
        before = _READINGS.unpack(numbers[self._name])
        shrunk = finite & (scale < 1 if shrunk is None else shrunk)
        scale = jnp.where(jnp.isfinite(scale), scale, 0.0).astype(jnp.float32)
        readings = _Packable(
            jnp.stack([encode(raw), encode(clipped), encode(limit), scale]),
            _trees.count_if(jnp.stack([shrunk, ~finite]), before.counts),
        )
        return {self._name: self._packing(updates).pack((readings, statistics))}

    def _start(self, tree) -> tuple[_Packable, Any]:
        return _init_readings(), self._init(tree)

    def _packing(self, tree) -> Packing:
        return Packing(jax.eval_shape(lambda: self._start(tree)))


def numbers_of_clips(state: Any) -> dict[str, jax.Array]:
    """Return the readings of every clip inside a state, as flat scalars."""
    numbers: dict[str, Any] = {}
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
            packed: Any
            ((name, packed),) = node.clip_numbers.items()
            # Unpacked on the host, unless it is traced.
            if not any(isinstance(array, Tracer) for array in packed):
                packed = tuple(np.asarray(array) for array in packed)
            numbers, counts = _READINGS.unpack(packed)
            fields = [numbers[..., i] for i in range(4)]
            fields += [counts[..., i] for i in range(2)]
            found.append((name, ClipReadings(*fields)))
            found += _found(getattr(node, "clip_inner", ()))
    return found


def _is_clip(node: Any) -> bool:
    return isinstance(getattr(node, "clip_numbers", None), dict)
