"""Which axes of a parameter form one unit: the fan-in of one output neuron.

A layer never says what its axes mean, so names and shapes must. First the layer axes,
which a scan or vmap over layers puts in front, strongest evidence first:

1. A bias beside a weight has the shape of its outputs, behind the same layer axes.
2. A gain has one axis of its own; attention has heads where `value` meets `out`.
3. The rest have the layer axes shared by the nearest subtree with a leaf of (1) or (2).

Then the fan-in among the axes left: all of a gain; the row of an embedding; as the bias
says; as the names of attention and convolutions say; as the rank says. What stays open,
such as a kernel of rank 3 without bias, is an error and never a guess.
"""

import operator
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._checks import require
from .._trees import path_name, paths_and_leaves
from ._layouts import BIAS_OF, OUTPUTS_FIRST, Axes, Leaf, Parts, described

AxisRule = int | Axes | Callable[[Any, Any], int | Axes | None] | None
StackRule = str | Callable[[Any, Any], bool | int] | None


def unit_axes(
    tree, axis: AxisRule = None, stacked: StackRule = None
) -> tuple[Axes, ...]:
    """The axes over which unit norms sum, for each leaf of `inexact_leaves`.

    Args:
        tree: Parameters, or their shapes and dtypes.
        axis: None infers. An integer or a tuple holds for all leaves of rank 2 or more.
            A callable gets key path and leaf, and returns either, or None to infer.
            Layer axes that `stacked` declares do not count: axis 0 is the next.
        stacked: Which leaves hold one array a layer along axis 0, which then never
            enters a unit. None infers. A string is a part of the path that leads to
            them, as "layers". A callable gets key path and leaf and returns whether
            they do, or the number of layer axes (nested scans).

    Raises:
        ValueError: If `axis` or `stacked` does not fit the tree, or if neither names
            nor shapes tell. The message shows what to pass.
    """
    pairs = paths_and_leaves(tree)
    # The keys of a flat dictionary may be dotted or slashed.
    names = [tuple(re.split(r"[./]", path_name(path))) for path, _ in pairs]
    shapes = dict(zip(names, [np.shape(leaf) for _, leaf in pairs], strict=True))
    leaves = [described(name, shapes) for name in names]
    if stacked is None:
        declared, depths = [0] * len(leaves), _inferred_depths(leaves)
    else:
        declared = depths = _declared_depths(stacked, pairs, leaves)
    units = []
    for pair, leaf, depth, offset in zip(pairs, leaves, depths, declared, strict=True):
        if callable(axis):
            given = axis(*pair)
        else:
            given = axis if len(leaf.shape) - offset >= 2 else None
        if given is not None:
            axes = _given_axes(given, pair[0], leaf.shape, offset)
        else:
            sure = stacked is not None or bool(depth)
            axes = None if depth is None else _inferred_axes(leaf, depth, sure)
        if axes is None:
            raise _undecided(pair[0], leaf, depth, stacked is None)
        units.append(axes)
    return tuple(units)


def _given_axes(given, path, shape: Axes, offset: int) -> Axes:
    """Checked, positive and sorted; `given` counts from axis `offset` on."""
    axes = given if isinstance(given, tuple) else (given,)
    try:
        unit = {range(offset, len(shape))[operator.index(a)] for a in axes}
    except (TypeError, IndexError):
        unit = set()
    if len(unit) != len(axes):
        raise ValueError(
            f"`axis` must be different axes of `{path_name(path)}`, which has shape "
            f"{shape[offset:]}{' a layer' * bool(offset)}, got {given!r}."
        )
    return tuple(sorted(unit))


def _declared_depths(
    stacked: str | Callable[[Any, Any], int], pairs, leaves: list[Leaf]
) -> list[int]:
    """How many layer axes `stacked` gives each leaf."""
    require(
        "stacked",
        stacked,
        "part of the path to some parameter, or a function (path, leaf) -> bool",
        lambda rule: callable(rule) or any(rule in leaf.module for leaf in leaves),
    )
    if isinstance(stacked, str):
        return [int(stacked in leaf.module) for leaf in leaves]
    return [int(stacked(*pair)) for pair in pairs]


def _inferred_depths(leaves: list[Leaf]) -> list[int | None]:
    """How many layer axes each leaf has, None if two answers fit."""
    shared: dict[Parts, Axes] = {}  # The layer axes of a subtree with a settled leaf.
    settled = [leaf for leaf in leaves if leaf.depth is not None]
    for leaf in settled + leaves:
        layers = leaf.shape[: leaf.depth]
        for subtree in _enclosing(leaf):
            if leaf.depth is not None or subtree in shared:
                shared[subtree] = _common_prefix(shared.get(subtree, layers), layers)
    depths = []
    for leaf in leaves:
        depth = leaf.depth
        if depth is None:
            depth = next((len(shared[s]) for s in _enclosing(leaf) if s in shared), 0)
            # That a subtree shares no layers does not exclude stacks within it.
            if leaf.readings and not (depth and depth in leaf.readings):
                named = leaf.outputs and len(leaf.bias) - leaf.outputs
                depth = named if named in leaf.readings else None
        depths.append(depth)
    return depths


def _enclosing(leaf: Leaf) -> list[Parts]:
    """The subtrees around a leaf, nearest first."""
    return [leaf.module[:end] for end in range(len(leaf.module), -1, -1)]


def _common_prefix(a: Axes, b: Axes) -> Axes:
    """The axes at which two shapes start alike."""
    length = min(len(a), len(b))
    while a[:length] != b[:length]:
        length -= 1
    return a[:length]


def _inferred_axes(leaf: Leaf, depth: int, sure: bool) -> Axes | None:
    """The unit behind `depth` layer axes, None if more than one answer fits."""
    rank, rest = len(leaf.shape), leaf.shape[depth:]
    if len(rest) <= 1 or leaf.gain:
        return tuple(range(depth, rank))
    if leaf.kind.endswith("embedding"):
        return (rank - 1,)
    if depth in leaf.readings:
        return leaf.readings[depth]
    if leaf.kind in OUTPUTS_FIRST:
        return tuple(range(depth + 1, rank)) if sure or len(rest) != 3 else None
    if len(rest) == 2:
        return (depth,)
    if leaf.bias:
        return None  # No layer known here has such a bias.
    if leaf.kind not in BIAS_OF and sum(size > 1 for size in rest) <= 1:
        return tuple(range(depth, rank))  # A vector, as a class token (1, 1, features).
    outputs = leaf.outputs if len(rest) == 3 else 1
    return None if outputs is None else tuple(range(depth, rank - outputs))


def _undecided(path, leaf: Leaf, depth: int | None, inferring: bool) -> ValueError:
    """The error that shows what a leaf could be, and how to say what it is."""
    shape, readings = leaf.shape, list(leaf.readings.items())
    if not inferring:  # Then `axis` counts from behind the layers.
        shape, depth = shape[depth:], 0
    if depth is not None:
        first = leaf.kind in OUTPUTS_FIRST
        unit = tuple(range(depth + first, len(shape) - 1 + first))
        readings = [(depth, unit)] + [(depth, unit[:1])] * (not first)
        readings += [(depth + 1, unit[1:])] * inferring
    text = f"cannot tell the unit axes of `{path_name(path)}`, shape {leaf.shape}:\n"
    for layers, axes in readings:
        inputs = () if leaf.gain else axes
        roles = ["in" if i in inputs else "out" for i in range(layers, len(shape))]
        text += f"  {axes}, if it is ({', '.join(['layers'] * layers + roles)})\n"
    text += (
        f"Say which:\n  axis=lambda path, leaf: {readings[0][1]} "
        f'if jax.tree_util.keystr(path) == "{jax.tree_util.keystr(path)}" else None'
    )
    if inferring and leaf.module:
        above = [part for part in leaf.module[:-1] if not part.isdigit()]
        text += (
            "\nor say which parameters hold one array a layer, from a scan or vmap:\n"
            f'  stacked="{(above or leaf.module)[-1]}" for all below it, or\n'
            "  stacked=lambda path, leaf: False for none"
        )
    return ValueError(text)
