"""Granularity: how the elements of a pytree are divided into groups.

global: one group     label: leaves that share a label     leaf: each leaf
unit: the weights of one output neuron, within each leaf
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import _checks, _trees
from . import _units


class Units(NamedTuple):
    axis: _units.AxisRule
    stacked: _units.StackRule
    exclude: str | Callable[[Any, Any], bool] | None


# "global", "leaf", "unit", `units(...)`, or a function (path, leaf) -> label or None.
Granularity = str | Units | Callable[[Any, Any], Hashable]

NAMES = ("global", "leaf", "unit")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Grouping:
    """The group of each element of a pytree; static, without arrays."""

    count: int  # The number of groups.
    first: tuple[int | None, ...]  # The first group of each leaf, None without one.
    # For units: the axes of each leaf that a unit spans, and the leaf's shape with
    # these axes of size 1. None and () if no group is smaller than a leaf.
    axes: tuple[_units.Axes, ...] | None = None
    shapes: tuple[_units.Axes, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all leaves are one group."""
        return self.axes is None and self.count == 1 and set(self.first) <= {0}

    @property
    def leafwise(self) -> bool:
        """Whether every leaf is a group."""
        return self.axes is None and self.first == tuple(range(self.count))

    @property
    def members(self) -> list[int]:
        """The indices of the leaves that belong to a group."""
        return [i for i, first in enumerate(self.first) if first is not None]


def units(
    axis: _units.AxisRule = None,
    stacked: _units.StackRule = None,
    exclude: str | Callable[[Any, Any], bool] | None = None,
) -> Units:
    """Judge each output neuron separately: the granularity "unit", with settings.

    A unit is the weights of one output: a column of a dense kernel (in, out), a filter
    of a convolution (..., in, out), one feature of one head of an attention projection,
    a row of an embedding, a whole gain or bias. In layers stacked by `nn.scan` or
    `nnx.scan`, each layer has its own units.

    Args:
        axis: The axes of a unit: an integer or tuple for all leaves of rank >= 2, or a
            function `(path, leaf)` that returns either, or None to infer them. Axes are
            counted without the layer axes that `stacked` declares. None: inferred.
        stacked: The leaves with a leading layer axis: the name of a module that holds
            them, such as "layers", or a function `(path, leaf)` that returns a bool, or
            the number of layer axes for nested scans. None: inferred.
        exclude: The leaves that are not judged: a name in their path, such as "head",
            or a function `(path, leaf) -> bool`.

    Returns:
        A value for `per=` of a threshold. A nan affects the norm of its own unit only.

    Raises:
        ValueError: When the optimizer is initialised, if a layout is unknown, where the
            message shows what to pass, or if no path has the name `exclude`.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> rule = sg.param_ratio(0.01, per=sg.units(exclude="head"))
        >>> tx = sg.guard(optax.sgd(0.1), sg.clip(rule))

    Reference:
        Brock et al. (2021), https://arxiv.org/abs/2102.06171.
    """
    return Units(axis, stacked, exclude)


def check_granularity(per: Granularity) -> None:
    """Raise ValueError unless `per` is a granularity."""
    expected = f"one of {NAMES}, `units(...)` or a function (path, leaf) -> label"
    known = lambda x: callable(x) or isinstance(x, Units) or x in NAMES
    _checks.require("per", per, expected, known)


def check_sharded(per: Granularity) -> None:
    """Raise ValueError if a device cannot measure the groups from its shards."""
    if isinstance(per, Units) or per == "unit":
        raise ValueError(
            'per="unit" cannot be used with `axis_name`: a device does not know which '
            'part of a unit it holds. Use per="leaf", or `jax.jit` with sharded '
            "arrays, where every unit is whole."
        )


def independent(count: int) -> Grouping:
    """Return one group for each of `count` leaves."""
    return Grouping(count, tuple(range(count)))


def group(per: Granularity, tree) -> Grouping:
    """Divide a pytree into groups by its names, shapes and dtypes."""
    leaves = _trees.paths_and_leaves(tree)
    if isinstance(per, Units) or per == "unit":
        return _unit_groups(per if isinstance(per, Units) else units(), tree, leaves)
    if per == "leaf":
        return independent(len(leaves))
    if per == "global":
        return Grouping(1, (0,) * len(leaves))
    labels = [_label(per, path, leaf) for path, leaf in leaves]
    known = dict.fromkeys(label for label in labels if label is not None)
    order = {label: i for i, label in enumerate(known)}
    return Grouping(len(order), tuple(order.get(label) for label in labels))


def group_names(per: Granularity, tree) -> tuple[str, ...]:
    """Return a name for each group of whole leaves, in their order."""
    if per == "leaf":
        return _trees.leaf_names(tree)
    if per == "global" or not callable(per):
        return ("all",)
    labels = [_label(per, *pair) for pair in _trees.paths_and_leaves(tree)]
    return tuple(map(str, dict.fromkeys(x for x in labels if x is not None)))


def _unit_groups(settings: Units, tree, leaves) -> Grouping:
    axis, stacked, exclude = settings
    axes = _units.unit_axes(tree, axis, stacked)
    known = {name for path, _ in leaves for name in _trees.path_name(path).split(".")}
    part = "part of the path to some parameter, or a function (path, leaf) -> bool"
    named = lambda x: isinstance(x, str) and (x in known or not leaves)
    matches = lambda x: x is None or callable(x) or named(x)
    _checks.require("exclude", exclude, part, matches)
    first, shapes, count = [], [], 0
    for (path, leaf), spanned in zip(leaves, axes, strict=True):
        sizes = enumerate(np.shape(leaf))
        shapes.append(tuple(1 if i in spanned else n for i, n in sizes))
        names = _trees.path_name(path).split(".")
        excluded = exclude(path, leaf) if callable(exclude) else exclude in names
        first.append(None if excluded else count)
        count += 0 if excluded else math.prod(shapes[-1])
    return Grouping(count, tuple(first), axes, tuple(shapes))


def _label(per, path, leaf) -> Hashable:
    label = per(path, leaf)
    try:
        hash(label)
    except TypeError as error:
        raise ValueError(
            "the function `per` must return a label that can be hashed, such as a "
            f"string, or None to leave the leaf out, got {label!r} for "
            f"{_trees.path_name(path)!r}."
        ) from error
    return label
