"""The axes of a parameter that form one unit: the inputs of one output neuron.

A layer does not state the meaning of its axes; names and shapes do. The layer axes that
a scan or vmap over layers puts in front are found first, in order of evidence:

1. The bias beside a weight has the shape of its outputs, after the same layer axes.
2. A gain has one axis of its own; in attention `value` and `out` share the heads.
3. Other leaves have the layer axes of the nearest subtree with a leaf of (1) or (2).

The other axes give the unit: all of a gain, the row of an embedding, or the inputs of a
weight by its bias, name or rank. More than one possible layout is an error, but without
a bias four axes and more are taken for a convolution.
"""

import operator
import re
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import jax
import numpy as np

from .._checks import require
from .._trees import path_name, paths_and_leaves
from ._layouts import BIAS_OF, OUTPUTS_FIRST, Axes, Leaf, Parts, describe_leaf

AxisRule = int | Axes | Callable[[Any, Any], int | Axes | None] | None
StackRule = str | Callable[[Any, Any], bool | int] | None


def unit_axes(
    tree, axis: AxisRule = None, stacked: StackRule = None
) -> tuple[Axes, ...]:
    """Return the axes over which unit norms sum, for each leaf of `inexact_leaves`.

    `axis` and `stacked` are those of `units`; `tree` may hold shapes and dtypes only.
    Raise ValueError if a rule does not fit the tree or a unit is not determined.
    """
    pairs = paths_and_leaves(tree)
    # The keys of a flat dictionary may contain dots or slashes.
    names = [tuple(re.split(r"[./]", path_name(path))) for path, _ in pairs]
    shapes = dict(zip(names, [np.shape(leaf) for _, leaf in pairs], strict=True))
    leaves = [describe_leaf(name, shapes) for name in names]
    if stacked is None:
        declared, depths = [0] * len(leaves), _inferred_depths(leaves)
    else:
        declared = depths = _declared_depths(stacked, pairs, leaves)
    units = []
    for pair, leaf, depth, offset in zip(pairs, leaves, depths, declared, strict=True):
        is_vector = len(leaf.shape) - offset < 2
        given = axis(*pair) if callable(axis) else None if is_vector else axis
        if given is not None:
            axes = _given_axes(given, pair[0], leaf.shape, offset)
        else:
            axes = _inferred_axes(leaf, depth, stacked is not None)
        if axes is None:
            raise _undecided(pair[0], leaf, depth, stacked is None)
        units.append(axes)
    return tuple(units)


def _given_axes(given, path, shape: Axes, offset: int) -> Axes:
    """Return the axes in order and from 0; `given` counts from axis `offset`."""
    axes = given if isinstance(given, tuple) else (given,)
    try:
        unit = {range(offset, len(shape))[operator.index(a)] for a in axes}
    except (TypeError, IndexError):
        unit = set()
    if len(unit) != len(axes):
        raise ValueError(
            f"`axis` must be different axes of `{path_name(path)}`, which has shape "
            f"{shape[offset:]}{' in each layer' * bool(offset)}, got {given!r}."
        )
    return tuple(sorted(unit))


def _declared_depths(stacked: StackRule, pairs, leaves: list[Leaf]) -> list[int]:
    """Return the number of layer axes of each leaf according to `stacked`."""
    if callable(stacked):
        return [int(stacked(*pair)) for pair in pairs]
    depths = [int(stacked in leaf.module) for leaf in leaves]
    expected = "part of the path to some parameter, or a function (path, leaf) -> bool"
    require("stacked", stacked, expected, lambda _: any(depths))
    return depths


def _inferred_depths(leaves: list[Leaf]) -> list[int | None]:
    """Return the number of layer axes of each leaf, None if two are possible."""
    shared: dict[Parts, Axes] = {}  # Layer axes of subtrees with a settled leaf.
    settled = [leaf for leaf in leaves if leaf.depth is not None]
    for leaf in settled + leaves:
        layers = leaf.shape[: leaf.depth]
        for subtree in _enclosing(leaf):
            if leaf.depth is not None or subtree in shared:
                pairs = zip(shared.get(subtree, layers), layers, strict=False)
                common = takewhile(lambda pair: pair[0] == pair[1], pairs)
                shared[subtree] = tuple(size for size, _ in common)
    depths = []
    for leaf in leaves:
        depth = leaf.depth
        if depth is None:
            depth = next((len(shared[s]) for s in _enclosing(leaf) if s in shared), 0)
            # A subtree without shared layer axes may still contain stacks.
            if leaf.readings and not (depth and depth in leaf.readings):
                named = leaf.outputs and len(leaf.bias) - leaf.outputs
                depth = named if named in leaf.readings else None
        depths.append(depth)
    return depths


def _enclosing(leaf: Leaf) -> list[Parts]:
    """Return the subtrees that contain a leaf, from the smallest."""
    return [leaf.module[:end] for end in range(len(leaf.module), -1, -1)]


def _inferred_axes(leaf: Leaf, depth: int | None, declared: bool) -> Axes | None:
    """Return the axes of a unit after `depth` layer axes, None if not determined."""
    if depth is None:
        return None
    rank, rest = len(leaf.shape), leaf.shape[depth:]
    if len(rest) <= 1 or leaf.gain:
        return tuple(range(depth, rank))
    if leaf.kind.endswith(("embedding", "embeddings")):
        return (rank - 1,)
    if depth in leaf.readings:
        return leaf.readings[depth]
    if leaf.kind in OUTPUTS_FIRST:
        certain = declared or depth or len(rest) != 3
        return tuple(range(depth + 1, rank)) if certain else None
    if len(rest) == 2:
        return (depth,)
    if leaf.bias:
        return None  # No known layer has such a bias.
    if leaf.kind not in BIAS_OF and sum(size > 1 for size in rest) <= 1:
        return tuple(range(depth, rank))  # A vector: a class token (1, 1, features).
    # Four axes and more are taken for a convolution.
    outputs = leaf.outputs if len(rest) == 3 else 1
    return None if outputs is None else tuple(range(depth, rank - outputs))


def _undecided(path, leaf: Leaf, depth: int | None, inferring: bool) -> ValueError:
    """Return an error that lists the possible layouts and how to choose one."""
    shape, readings = leaf.shape, list(leaf.readings.items())
    if not inferring:  # Then `axis` counts after the layer axes.
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
    key = jax.tree_util.keystr(path)
    text += f"Pass one of them:\n  axis=lambda path, leaf: {readings[0][1]} "
    text += f'if jax.tree_util.keystr(path) == "{key}" else None'
    if inferring and leaf.module:
        above = [part for part in leaf.module[:-1] if not part.isdigit()]
        text += "\nor pass which parameters hold one array per layer (scan or vmap):\n"
        text += f'  stacked="{(above or leaf.module)[-1]}" for all below it, or\n'
        text += "  stacked=lambda path, leaf: False for none"
    return ValueError(text)
