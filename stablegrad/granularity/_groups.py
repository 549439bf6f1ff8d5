"""Granularity: into which groups the numbers of a step fall.

global: one group     label: leaves that share a label     leaf: each leaf
unit: within each leaf, the fan-in of one output neuron
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import _checks, _trees
from . import _units


class Units(NamedTuple):
    """The granularity that `units` builds."""

    axis: _units.AxisRule
    stacked: _units.StackRule
    exclude: str | Callable[[Any, Any], bool] | None


# "global", "leaf", "unit", `units(...)`, or a function (path, leaf) -> label or None.
Granularity = str | Units | Callable[[Any, Any], Hashable]

NAMES = ("global", "leaf", "unit")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Grouping:
    """Which group each element of a pytree belongs to; static, without arrays."""

    count: int  # How many groups there are.
    # For each leaf: its first group, None if it has none; and the axes that one group
    # spans, None for all of them.
    first: tuple[int | None, ...]
    axes: tuple[tuple[int, ...] | None, ...]
    kept: tuple[tuple[int, ...], ...]  # Shape of the leaf's groups, rank of the leaf.

    @property
    def by_leaf(self) -> bool:
        """Whether no group is smaller than a leaf."""
        return all(axes is None for axes in self.axes)

    @property
    def whole(self) -> bool:
        """Whether all leaves are one group."""
        return self.count == 1 and self.by_leaf and set(self.first) <= {0}

    @property
    def leafwise(self) -> bool:
        """Whether every leaf is a group."""
        return self.by_leaf and self.first == tuple(range(self.count))


def units(
    axis: _units.AxisRule = None,
    stacked: _units.StackRule = None,
    exclude: str | Callable[[Any, Any], bool] | None = None,
) -> Units:
    """Judges each output neuron by itself: the granularity "unit", with settings.

    A unit is what feeds one output: the column of a dense kernel (in, out), one filter
    of a convolution (..., in, out), one head's output of an attention projection, the
    row of an embedding, the whole of a gain or bias. Layers stacked by `nn.scan` or
    `nnx.scan` count one by one.

    Args:
        axis: The axes that one unit spans, where they cannot be told from names and
            shapes: an integer, a tuple, or a function `(path, leaf)` that returns one,
            or None to infer them.
        stacked: Which leaves have a leading layer axis: the name of the module that
            holds them, or a function `(path, leaf) -> bool`. None: inferred.
        exclude: Which leaves are left alone: a name in their path, such as "head", or a
            function `(path, leaf) -> bool`.

    Returns:
        A granularity, for the `per=` of a threshold.

    Raises:
        ValueError: When the optimizer is initialised, if a layout is unknown; the
            message shows what to pass.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> rule = sg.param_ratio(0.01, per=sg.units(exclude="head"))
        >>> tx = sg.guard(optax.sgd(0.1), sg.clip(rule))

    Reference:
        Brock et al., High-performance large-scale image recognition without
        normalization (2021), https://arxiv.org/abs/2102.06171.
    """
    return Units(axis, stacked, exclude)


def check_granularity(per: Granularity) -> None:
    """Raises ValueError unless `per` is one."""
    _checks.require(
        "per",
        per,
        f"one of {NAMES}, `units(...)` or a function (path, leaf) -> label",
        lambda x: callable(x) or isinstance(x, Units) or x in NAMES,
    )


def check_sharded(per: Granularity) -> None:
    """Raises ValueError unless a device can judge by `per` from its shards alone."""
    if isinstance(per, Units) or per == "unit":
        raise ValueError(
            'per="unit" cannot be used with `axis_name`: a device cannot tell which '
            'part of a unit it holds. Use per="leaf", or `jax.jit` with sharded '
            "arrays, where every unit is whole."
        )


def independent(count: int) -> Grouping:
    """One group for each of `count` numbers."""
    return Grouping(count, tuple(range(count)), (None,) * count, ((),) * count)


def group(per: Granularity, tree) -> Grouping:
    """The groups of a pytree; only names, shapes and dtypes are looked at."""
    leaves = _trees.paths_and_leaves(tree)
    shapes = [tuple(np.shape(leaf)) for _, leaf in leaves]
    kept = tuple((1,) * len(shape) for shape in shapes)
    every: tuple[None, ...] = (None,) * len(leaves)
    if isinstance(per, Units) or per == "unit":
        return _unit_groups(per if isinstance(per, Units) else units(), tree, leaves)
    if callable(per):
        labels = [_label(per, path, leaf) for path, leaf in leaves]
        known = dict.fromkeys(label for label in labels if label is not None)
        order = {label: i for i, label in enumerate(known)}
        first = tuple(None if label is None else order[label] for label in labels)
        return Grouping(len(order), first, every, kept)
    if per == "leaf":
        return Grouping(len(leaves), tuple(range(len(leaves))), every, kept)
    return Grouping(1, (0,) * len(leaves), every, kept)


def _unit_groups(settings: Units, tree, leaves) -> Grouping:
    axes = list(_units.unit_axes(tree, settings.axis, settings.stacked))
    first: list[int | None] = []
    kept, count = [], 0
    for (path, leaf), spanned in zip(leaves, axes, strict=True):
        shape = tuple(np.shape(leaf))
        rest = tuple(1 if i in spanned else n for i, n in enumerate(shape))
        kept.append(rest)
        if _excluded(settings.exclude, path, leaf):
            first.append(None)
            continue
        first.append(count)
        count += int(np.prod(rest, dtype=np.int64))
    return Grouping(count, tuple(first), tuple(axes), tuple(kept))


def _excluded(exclude, path, leaf) -> bool:
    if exclude is None:
        return False
    if callable(exclude):
        return bool(exclude(path, leaf))
    return exclude in _trees.path_name(path).split(".")


def _label(per, path, leaf) -> Hashable:
    label = per(path, leaf)
    if not isinstance(label, Hashable):
        raise ValueError(
            "the function given as `per` must return a label that can be hashed, such "
            f"as a string, or None to leave the leaf out; for "
            f"{_trees.path_name(path)!r} it returned {label!r}."
        )
    return label
