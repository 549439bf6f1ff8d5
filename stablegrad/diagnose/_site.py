"""A site: a measured operation of the traced loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ._elementwise import Activation
from ._program import Value


@dataclasses.dataclass(eq=False)
class Site:
    """A measured operation; `kind` says which statistics apply."""

    kind: str  # linear, conv, embed, norm, sum, attention or router
    value: Value  # Its result, after the bias.
    name: str = ""
    path: tuple[int, ...] = ()  # Its order, within each of the scans that hold it.
    source: Value | None = None  # What it is applied to.
    weight: Value | None = None
    leaf: int = -1  # The parameter that it is named after.
    fan_in: int = 1
    fan_out: int = 1
    unit_axis: int = -1
    activation: Activation | None = None
    normalised: bool = False  # Whether a normalisation takes the result.
    beside_stream: bool = False  # Whether it lies beside a residual stream.
    starts_stream: bool = False  # Whether it is the first sum of a residual stream.
    joined: bool = False  # Whether another array is added to it, or multiplies it.
    feeds: list["Site"] = dataclasses.field(default_factory=list)
    parents: list["Site"] = dataclasses.field(default_factory=list)
    dtype: str = ""  # Of the operation, before any cast of its result.
    heads: list["Site"] = dataclasses.field(default_factory=list)  # That it ends in.
    recurrent: bool = False  # Whether it takes what an iteration hands to the next.
    sliced: tuple[bool, ...] = ()  # For each scan around it: over layers, not time.
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def last_layer(value: Value, layers: Sequence[Site]) -> Site | None:
    """Return the deepest layer that a value is made of."""
    before = [site for site in layers if value.comes_from(site.value)]
    return max(before, key=lambda site: site.value.order, default=None)
