"""The layout of a parameter, as its name, its shape and its module show it.

Flax and Equinox name their parameters kernel or weight, bias, scale and embedding. A
bias has the shape of the outputs of the weight beside it.
"""

from typing import NamedTuple

Axes = tuple[int, ...]
Parts = tuple[str, ...]  # The parts of a name: `layers.0.kernel` has three.

BIAS_OF = {"kernel": "bias", "weight": "bias", "w": "b"}
OUTPUTS_FIRST = ("weight", "weight_ih", "weight_hh")  # In Equinox and PyTorch.
PROJECTIONS = ("query", "key", "value")


class Leaf(NamedTuple):
    """A parameter, and what its own module shows of its layout."""

    module: Parts
    kind: str  # The last part of the name, such as `kernel`.
    shape: Axes
    gain: bool  # Whether it is a gain or bias, which is one unit.
    bias: Axes  # The shape of the bias beside a weight, or (); a bias has its own.
    outputs: int | None  # The number of output axes, if the layer's name shows it.
    readings: dict[int, Axes]  # Axes of a unit by number of layer axes, from the bias.
    depth: int | None  # The number of layer axes, if the module determines it.


def describe_leaf(name: Parts, shapes: dict[Parts, Axes]) -> Leaf:
    """Describe a parameter; a bias has as many layer axes as its weight."""
    module, kind, shape = name[:-1], name[-1], shapes[name]
    rank = len(shape)
    for weight, bias in BIAS_OF.items():
        if kind == bias and (*module, weight) in shapes:
            owner = describe_leaf((*module, weight), shapes)
            whole = {depth: tuple(range(depth, rank)) for depth in owner.readings}
            return owner._replace(kind=kind, shape=shape, gain=True, readings=whole)
    bias = shapes.get((*module, BIAS_OF.get(kind, "")), ())
    # The normalisations of Equinox have a `weight` of the shape of their bias.
    gain = kind in ("scale", "bias") or (kind == "weight" and shape == bias)
    readings = _bias_readings(kind, shape, bias)
    depth = None
    if len(readings) == 1:
        (depth,) = readings
    elif gain:
        depth = max(rank - 1, 0)
    elif _is_attention(module, kind, shapes):
        depth = rank - 3
    elif kind in ("kernel", "w") and rank == 2:
        depth = 0
    outputs = _named_outputs(module, kind, shapes)
    return Leaf(module, kind, shape, gain, bias, outputs, readings, depth)


def _bias_readings(kind: str, shape: Axes, bias: Axes) -> dict[int, Axes]:
    """Return the input axes for each number of layer axes that the bias allows."""
    rank, outputs_first, outputs_last = len(shape), {}, {}
    for depth in range(len(bias) if rank > len(bias) else 0):
        outputs = bias[depth:]
        if shape[:depth] != bias[:depth]:
            break
        if shape[-len(outputs) :] == outputs:
            outputs_last[depth] = tuple(range(depth, rank - len(outputs)))
        # Equinox has (out, 1, 1) beside (out, in, height, width). Only the first match
        # is used: a second one differs by an axis of size 1.
        if not outputs_first and outputs == (shape[depth], *(1,) * (len(outputs) - 1)):
            outputs_first[depth] = tuple(range(depth + 1, rank))
    return (kind in OUTPUTS_FIRST and outputs_first) or outputs_last


def _is_attention(module: Parts, kind: str, shapes: dict[Parts, Axes]) -> bool:
    """Return whether `out` takes the (heads, features) that `value` returns."""
    if not module or module[-1] not in (*PROJECTIONS, "out"):
        return False
    value, out = (shapes.get((*module[:-1], x, kind), ()) for x in ("value", "out"))
    alike = len(shapes[*module, kind]) == len(value) == len(out) >= 3
    return alike and value[-2:] == out[-3:-1]


def _named_outputs(module: Parts, kind: str, shapes: dict[Parts, Axes]) -> int | None:
    """Return the number of output axes that a layer's name shows."""
    if kind not in BIAS_OF or not module:
        return None
    *parent, layer = module
    if layer in PROJECTIONS:
        return 2
    attention = any((*parent, name, kind) in shapes for name in PROJECTIONS)
    return 1 if "conv" in layer.lower() or (layer == "out" and attention) else None
