"""The layout of a guard's numbers: which belong to which response or threshold.

A state carries it as the keys of a dict without arrays. Therefore a guard with other
responses can read a checkpoint, and a state that does not match its guard is detected
before its numbers are misread.

    0 version 2
    1 state skip int32                               leaves of a response's state
    2 statistics float32.110 float32 int32           leaves of a family, of one group
    3 rows rarity grad_norm global 1                 its thresholds, and their groups
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._trees import layout, names_in
from ..granularity._groups import group
from ..responses._base import Response
from ..thresholds._base import Threshold
from ..thresholds._signals import signal_name
from ._families import Statistics

VERSION = 2  # Of the record and of this description.


class State(NamedTuple):
    """The state of a response."""

    name: str
    leaves: tuple[str, ...]  # dtype and shape, as "float32.3".


class Rows(NamedTuple):
    """The statistics of a threshold: rows of its family's arrays."""

    threshold: str  # Name, signal and granularity.
    leaves: tuple[str, ...]  # Of one group.
    groups: int


def describe(
    responses: tuple[Response, ...], statistics: Statistics, like: Any
) -> dict[str, None]:
    """Return the layout of a guard's numbers after its record."""
    lines = [f"version {VERSION}"]
    for response in responses:
        specs = jax.eval_shape(response.init_state)
        lines.append(" ".join(["state", response.name, *_words(specs)]))
    for members in statistics.members:
        one = jax.eval_shape(lambda members=members: members[0].init(1))
        specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), one)
        lines.append(" ".join(["statistics", *_words(specs)]))
        for threshold in members:
            groups = group(threshold.per, like).count
            lines.append(f"rows {_label(threshold)} {groups}")
    return layout(tuple(lines))


def version_of(described: dict[str, None]) -> int:
    """Return the version of a layout; 1, if there was none yet."""
    lines = names_in(described)
    return int(lines[0].split()[1]) if lines else 1


def parts_of(described: dict[str, None]) -> list[State | list[Rows]]:
    """Return the parts of the numbers in order; a family is a list of thresholds."""
    parts: list[State | list[Rows]] = []
    leaves: tuple[str, ...] = ()
    for line in names_in(described)[1:]:
        kind, *words = line.split()
        if kind == "state":
            parts.append(State(words[0], tuple(words[1:])))
        elif kind == "statistics":
            leaves = tuple(words)
            parts.append([])
        else:
            *label, groups = words
            family = parts[-1]
            assert isinstance(family, list)
            family.append(Rows(" ".join(label), leaves, int(groups)))
    return parts


def structs_of(part: State | list[Rows]) -> list[jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of the arrays of a part."""
    if isinstance(part, State):
        return [_struct(word) for word in part.leaves]
    rows = sum(own.groups for own in part)
    return [_struct(word, (rows,)) for word in part[0].leaves]


def _words(specs) -> list[str]:
    return [
        ".".join([str(x.dtype), *map(str, x.shape)]) for x in jax.tree.leaves(specs)
    ]


def _struct(word: str, leading: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
    dtype, *shape = word.split(".")
    return jax.ShapeDtypeStruct((*leading, *map(int, shape)), jnp.dtype(dtype))


def _label(threshold: Threshold) -> str:
    per = threshold.per
    name = per if isinstance(per, str) else getattr(per, "__name__", repr(per))
    words = threshold.name, signal_name(threshold.of), re.sub(r"\W+", "_", name)
    return " ".join(words)
