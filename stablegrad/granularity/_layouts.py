"""What its name, its shape and its neighbours tell of a parameter's layout.

Flax and Equinox call their parameters kernel or weight, bias, scale and embedding; a
bias has the shape of the outputs of the weight beside it.
"""

from typing import NamedTuple

Axes = tuple[int, ...]
Parts = tuple[str, ...]  # Of a name: `layers.0.kernel` has three.

BIAS_OF = {"kernel": "bias", "weight": "bias", "w": "b"}
OUTPUTS_FIRST = ("weight", "weight_ih", "weight_hh")  # In Equinox and PyTorch.
PROJECTIONS = ("query", "key", "value")


class Leaf(NamedTuple):
    """A leaf, and what its own module says about it."""

    module: Parts
    kind: str  # The last part of the name, as `kernel`.
    shape: Axes
    gain: bool  # A gain or bias: all of it is one unit.
    bias: Axes  # The shape of the bias beside a weight, () without; a bias has its own.
    outputs: int | None  # The number of output axes, as far as the layer's name tells.
    readings: dict[int, Axes]  # The unit by number of layer axes, where the bias fits.
    depth: int | None  # The number of layer axes, where the module settles it.


def described(name: Parts, shapes: dict[Parts, Axes]) -> Leaf:
    """A leaf as its module shows it; a bias has as many layers as its weight."""
    module, kind, shape = name[:-1], name[-1], shapes[name]
    rank = len(shape)
    for weight, bias in BIAS_OF.items():
        if kind == bias and (*module, weight) in shapes:
            owner = described((*module, weight), shapes)
            whole = {depth: tuple(range(depth, rank)) for depth in owner.readings}
            return owner._replace(kind=kind, shape=shape, gain=True, readings=whole)
    bias = shapes.get((*module, BIAS_OF.get(kind, "")), ())
    # Equinox's normalisations have a `weight` of the shape of their bias.
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
    """The fan-in axes by number of layer axes, where the bias fits the outputs."""
    rank, outputs_first, outputs_last = len(shape), {}, {}
    for depth in range(len(bias) if rank > len(bias) else 0):
        outputs = bias[depth:]
        if shape[:depth] != bias[:depth]:
            break
        if shape[-len(outputs) :] == outputs:
            outputs_last[depth] = tuple(range(depth, rank - len(outputs)))
        # Equinox has (out, 1, 1) beside (out, in, height, width). The first fit will
        # do: a second one differs by an axis of size 1.
        if not outputs_first and outputs == (shape[depth], *(1,) * (len(outputs) - 1)):
            outputs_first[depth] = tuple(range(depth + 1, rank))
    return (kind in OUTPUTS_FIRST and outputs_first) or outputs_last


def _is_attention(module: Parts, kind: str, shapes: dict[Parts, Axes]) -> bool:
    """Whether `out` takes in the (heads, features) that `value` puts out."""
    if not (module and module[-1] in (*PROJECTIONS, "out")):
        return False
    shape = shapes[*module, kind]
    value, out = (
        shapes.get((*module[:-1], name, kind), ()) for name in ("value", "out")
    )
    return len(shape) == len(value) == len(out) >= 3 and value[-2:] == out[-3:-1]


def _named_outputs(module: Parts, kind: str, shapes: dict[Parts, Axes]) -> int | None:
    """How many axes a layer of this name puts out: attention, convolutions."""
    if kind not in BIAS_OF or not module:
        return None
    *parent, layer = module
    if layer in PROJECTIONS:
        return 2
    attending = any((*parent, name, kind) in shapes for name in PROJECTIONS)
    return 1 if "conv" in layer.lower() or (layer == "out" and attending) else None
