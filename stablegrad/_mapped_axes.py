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
        whole = math.prod(lax.axis_size(name) for name in self.names)
        copies = [whole // shards for shards in self.shards(leaves)]
        shares = [part / count for part, count in zip(parts, copies, strict=True)]
        return lax.psum(self._everywhere(jnp.stack(shares)), self.names)

    def largest(self, numbers: jax.Array) -> jax.Array:
        """The largest over the axes, elementwise."""
        if not self.names:
            return numbers
        return lax.pmax(self._everywhere(numbers), self.names)

    def mean(self, numbers: jax.Array) -> jax.Array:
        """The mean over the axes, elementwise; the number itself if all agree."""
        if not self.names:
            return numbers
        return lax.pmean(self._everywhere(numbers), self.names)

    def any(self, flag: jax.Array) -> jax.Array:
        """Whether the flag is set on any device."""
        return self.largest(flag.astype(jnp.int32)) > 0 if self.names else flag

    def all(self, flag: jax.Array) -> jax.Array:
        """Whether the flag is set on every device."""
        return ~self.any(~flag) if self.names else flag

    def shards(self, leaves: list) -> list[int]:
        """Over how many devices each leaf is split; 1 outside of the mapped function.

        Where it is not told which leaves vary over an axis, all of them do.
        """
        try:
            sizes = {name: lax.axis_size(name) for name in self.names}
        except NameError:
            return [1] * len(leaves)
        every = frozenset(self.names)
        split = [
            varies_over(leaf) & every if self._told() else every for leaf in leaves
        ]
        return [math.prod(sizes[name] for name in own) for own in split]

    def _told(self) -> bool:
        """Whether it is known of each array which axes it varies over."""
        return bool(self.names and varies_over(lax.axis_index(self.names[0])))

    def _everywhere(self, numbers: jax.Array) -> jax.Array:
        """The same numbers as what a collective over all axes takes."""
        return varying(numbers, frozenset(self.names)) if self._told() else numbers


HERE = Across()  # Over no axis.


def across(axis_name: AxisName) -> Across:
    """The axes named by one name, a tuple of names, or None."""
    if axis_name is None:
        return HERE
    return Across(axis_name if isinstance(axis_name, tuple) else (axis_name,))


def varies_over(leaf: Any) -> frozenset:
    """The axes that `shard_map` knows a leaf, or its abstract value, to vary over."""
    kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    told = getattr(kind, "manual_axis_type", None)  # Called `vma` by older JAX.
    axes = getattr(kind, "vma", None) if told is None else told.varying
    return frozenset(axes or ())


def varying(leaf: jax.Array, names: frozenset) -> jax.Array:
    """The same array, held to vary over axes on which all devices have it alike."""
    missing = tuple(names - varies_over(leaf))
    if not missing:
        return leaf
    if hasattr(lax, "pcast"):
        return lax.pcast(leaf, missing, to="varying")
    return lax.pvary(leaf, missing)  # pyright: ignore[reportAttributeAccessIssue]
