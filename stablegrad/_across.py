"""Across devices: sums and means over mapped axes, so that all decide alike.

Inside `shard_map` and `pmap` a device sees its own shard. What it adds up is summed
over the axes once for each shard; a leaf that does not vary over an axis counts once.
"""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

AxisName = Hashable | tuple[Hashable, ...] | None


class Across(NamedTuple):
    """The mapped axes over which leaves are sharded; none by default."""

    names: tuple[Hashable, ...] = ()

    def totals(self, parts: list[jax.Array], leaves: list) -> jax.Array:
        """The rank-0 part of each leaf, added up over all its shards: (leaves,)."""
        if not self.names:
            return jnp.stack(parts)
        sharded = self._sharded(leaves)
        copies = [
            math.prod(lax.axis_size(name) for name in self.names if name not in over)
            for over in sharded
        ]
        shares = [part / count for part, count in zip(parts, copies, strict=True)]
        return lax.psum(jnp.stack(shares), self.names)

    def largest(self, numbers: jax.Array) -> jax.Array:
        """The largest over the axes, elementwise."""
        return lax.pmax(numbers, self.names) if self.names else numbers

    def mean(self, numbers: jax.Array) -> jax.Array:
        """The mean over the axes, elementwise; the number itself if all agree."""
        return lax.pmean(numbers, self.names) if self.names else numbers

    def any(self, flag: jax.Array) -> jax.Array:
        """Whether the flag is set on any device."""
        return self.largest(flag.astype(jnp.int32)) > 0 if self.names else flag

    def _sharded(self, leaves: list) -> list[frozenset]:
        """For each leaf, the axes that it varies over; all where that is not told."""
        varying = [_varies_over(leaf) & set(self.names) for leaf in leaves]
        if not any(varying):
            return [frozenset(self.names)] * len(leaves)
        return varying


HERE = Across()  # Over no axis.


def across(axis_name: AxisName) -> Across:
    """The axes named by one name, a tuple of names, or None."""
    if axis_name is None:
        return HERE
    return Across(axis_name if isinstance(axis_name, tuple) else (axis_name,))


def _varies_over(leaf: Any) -> frozenset:
    return frozenset(getattr(jax.typeof(leaf), "vma", frozenset()))
