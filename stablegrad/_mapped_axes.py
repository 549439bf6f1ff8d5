"""Mapped axes: sums and means over the devices of `shard_map` and `pmap`.

Inside these functions a device sees its own shard. Sums of shards are added up over the
axes, so that every device computes the same norms and makes the same decisions.
"""

import math
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AxisName = Hashable | tuple[Hashable, ...] | None


class MappedAxes(NamedTuple):
    """The mapped axes over which leaves are sharded; none by default."""

    names: tuple[Hashable, ...] = ()
    averaged: bool = False  # Whether every device holds the whole, averaged gradients.

    def totals(self, sums: jax.Array, leaves: list) -> jax.Array:
        """Add up the sum of each leaf, float32 (leaves,), over all its shards."""
        if not leaves or not self.names or self.averaged:
            return sums
        whole = math.prod(lax.axis_size(name) for name in self.names)
        copies = [whole // shards for shards in self._shards(leaves)]
        return lax.psum(
            self._varying(sums / np.asarray(copies, np.float32)), self.names
        )

    def mean(self, number: jax.Array) -> jax.Array:
        """Average a number over the axes."""
        return lax.pmean(self._varying(number), self.names) if self.names else number

    def total(self, counts: jax.Array) -> jax.Array:
        """Add up integer counts over the axes, so that all devices report alike.

        Of averaged gradients every device has the same, and the largest count is taken.
        """
        if not self.names:
            return counts
        join = lax.pmax if self.averaged else lax.psum
        return join(self._varying(counts), self.names)

    def _shards(self, leaves: list) -> list[int]:
        """Count the devices over which each leaf is split.

        Where JAX does not track which leaves vary over an axis, all of them do.
        """
        sizes = {name: lax.axis_size(name) for name in self.names}
        every = frozenset(self.names)
        tracked = _tracked(self.names[0])
        split = [varies_over(leaf) & every if tracked else every for leaf in leaves]
        return [math.prod(sizes[name] for name in own) for own in split]

    def _varying(self, numbers: jax.Array) -> jax.Array:
        """Mark numbers as varying over all axes, as a collective requires."""
        if not _tracked(self.names[0]):
            return numbers
        return varying(numbers, frozenset(self.names))


LOCAL = MappedAxes()  # No axis: a device sees everything.


def mapped_axes(axis_name: AxisName, averaged: bool = False) -> MappedAxes:
    """Return the axes given by one name, a tuple of names, or None."""
    if axis_name is None:
        if averaged:
            raise ValueError(
                "`averaged_gradients=True` needs the name of the mapped axis over "
                "which they are averaged, `axis_name=`."
            )
        return LOCAL
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return MappedAxes(names, averaged)


def varies_over(leaf: Any) -> frozenset:
    """Return the axes that `shard_map` knows a leaf, or its type, to vary over."""
    kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    told = getattr(kind, "manual_axis_type", None)  # Called `vma` by older JAX.
    axes = getattr(kind, "vma", None) if told is None else told.varying
    return frozenset(axes or ())


def varying(leaf: jax.Array, names: frozenset) -> jax.Array:
    """Mark an array as varying over axes on which all devices have it alike."""
    missing = tuple(names - varies_over(leaf))
    if not missing:
        return leaf
    if hasattr(lax, "pcast"):
        return lax.pcast(leaf, missing, to="varying")
    # Older versions of JAX.
    return lax.pvary(leaf, missing)  # pyright: ignore[reportAttributeAccessIssue]


def varying_like(tree: Any, other: Any) -> Any:
    """Mark arrays as varying over the axes over which those of `other` vary."""
    if not manual_axes():
        return tree
    mark = lambda leaf, like: varying(jnp.asarray(leaf), varies_over(like))
    return jax.tree.map(mark, tree, other)


def varying_like_next(turn: Callable[[Any], Any], carry: Any) -> Any:
    """Mark a loop's first carry as varying over the axes over which the next one does.

    `turn` returns the next carry.
    """
    if not manual_axes():
        return carry
    return varying_like(carry, jax.eval_shape(turn, carry))


def warn_of_replicas(what: str, number: Any, updates: Any, *, blind=True) -> None:
    """Warn if replicas may decide apart: a number differs between mapped devices.

    Called where no `axis_name=` is given. Where JAX tracks what varies, the number, or
    its type, must vary over no axis that the gradients do not vary over. Where it does
    not, replicas and ensemble members look the same: the warning comes if `blind`.
    """
    axes = manual_axes()
    if number is None or not axes:
        return
    if _tracked(axes[0]):
        own = [varies_over(jnp.asarray(leaf)) for leaf in jax.tree.leaves(updates)]
        is_type = isinstance(number, jax.ShapeDtypeStruct)
        number = number if is_type else jnp.asarray(number)
        if not varies_over(number) - frozenset().union(*own):
            return
    elif not blind:
        return
    warnings.warn(
        f"{what} may differ between the devices of the mapped axes {axes}, and no "
        "`axis_name=` is given: replicas of one model could then make different "
        "decisions. Average it with `jax.lax.pmean`, or pass `axis_name=` to the guard "
        "(with `averaged_gradients=True` if gradients are already averaged over it). "
        "For an ensemble with one model a device, ignore this warning.",
        stacklevel=4,
    )


def manual_axes() -> tuple[Hashable, ...]:
    """Return the axes of the `shard_map` or `pmap` around the current trace."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(getattr(mesh, "manual_axes", ()) or ())


def _tracked(name: Hashable) -> bool:
    """Return whether JAX tracks which arrays vary over the axis."""
    return bool(varies_over(lax.axis_index(name)))
