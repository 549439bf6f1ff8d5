"""Which leaves of an optimizer's state are of one kind, and share one range.

An optimizer keeps one tree like the parameters for each thing that it remembers, such
as Adam's `mu` and `nu`. Leaves whose paths differ only in the part that names a
parameter are of one kind.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from .. import _trees
from ._range import Range, join

Kinds = tuple[int | None, ...]  # For each leaf its kind, None for a single number.


class Layout(NamedTuple):
    """Static: what the leaves of state and parameters are."""

    of_state: Kinds
    of_params: Kinds  # Kind 0, unless a single number.
    kinds: int  # How many there are.
    owners: tuple[int | None, ...]  # For each state leaf, the parameter it belongs to.


def layout_of(inner_state: Any, params: Any) -> Layout:
    """The kinds of an optimizer's state beside its parameters."""
    named = jax.tree_util.tree_flatten_with_path(params)[0]
    place = {_parts(path): i for i, (path, _) in enumerate(named)}
    order: dict[Any, int] = {("parameters",): 0}
    of_state: list[int | None] = []
    owners: list[int | None] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(inner_state)[0]:
        parts = _parts(path)
        ends = [i for i in range(len(parts) + 1) if parts[i:] in place]
        start = ends[0] if ends else len(parts)
        owners.append(place[parts[start:]] if ends else None)
        kind = None
        if np.ndim(leaf) and _trees.is_inexact(leaf):
            key = (*parts[:start], str(jax.dtypes.result_type(leaf)))
            kind = order.setdefault(key, len(order))
        of_state.append(kind)
    of_params = tuple(
        0 if np.ndim(leaf) and _trees.is_inexact(leaf) else None for _, leaf in named
    )
    return Layout(tuple(of_state), of_params, len(order), tuple(owners))


def _parts(path) -> tuple[str, ...]:
    """A path without the `.value` by which Flax NNX wraps every array."""
    return tuple(str(key) for key in path if str(key) != ".value")


def collect(found: list[tuple[int, Range]], before: list[Range]) -> list[Range]:
    """One range a kind, which holds all that were found of it; `before` if none was."""
    after: list[Range | None] = [None] * len(before)
    for kind, own in found:
        known = after[kind]
        after[kind] = own if known is None else join(known, own)
    return [old if new is None else new for new, old in zip(after, before, strict=True)]
