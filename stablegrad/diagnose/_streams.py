"""Residual sums, and results that a normalisation takes."""

import itertools
from collections.abc import Iterator

from ._program import Program, Value
from ._site import Site, last_layer

JOINS = ("add", "add_any", "sub", "mul", "dot_general", "gather", "concatenate")


def residual_sums(program: Program, linear_bits: int, layers) -> list[Site]:
    """Sums x + f(x) with a layer in f."""
    found = []
    for a, b, total in _sums(program):
        for x, f in ((a, b), (b, a)):
            between = f.ancestors & ~x.ancestors & linear_bits
            if f.comes_from(x) and between and f.aval.ndim > 1:
                branch = last_layer(f, layers)
                if branch is None:
                    continue
                for layer in layers:
                    layer.beside_stream |= _is_own(layer.value, f, x)
                site = Site("sum", total, source=x)
                site.extra, site.parents = {"branch": f}, [branch]
                site.starts_stream = not any(x.comes_from(s.value) for s in found)
                found.append(site)
                break
    return found


def mark_beside(program: Program, linear) -> None:
    """Mark the layers that a path of fewer layers bypasses.

    Such a path is a projection, or a concatenation with the input of the layers.
    """
    for x, f in _concatenated(program):
        for layer in linear:
            layer.beside_stream |= f.comes_from(x) and _is_own(layer.value, f, x)
    for a, b, _ in _sums(program):
        if a.aval.ndim < 2:
            continue
        for short, long in ((a, b), (b, a)):
            fewer = [x for x in linear if _is_own(x.value, short, long)]
            start = fewer[0].source if fewer else None
            if start is None:
                continue
            more = [x for x in linear if _is_own(x.value, long, short)]
            more = [x for x in more if x.value.comes_from(start)]
            if len(more) > len(fewer):
                for layer in more:
                    layer.beside_stream = True


def _concatenated(program: Program) -> Iterator[tuple[Value, Value]]:
    """The pairs of arrays of data that are concatenated along their features."""
    for op in program.ops:
        if op.name == "concatenate":
            axis = op.outs[0].aval.ndim - 1
            data = [v for v in op.ins if v.is_data and v.aval.shape[axis] > 1]
            if op.eqn.params["dimension"] == axis > 0:
                yield from itertools.permutations(data, 2)


def mark_joined(program: Program, linear) -> None:
    """Mark the layers whose result is added to, multiplies or indexes another array.

    The layers of a gate lie beside the array that it multiplies, if they compute the
    gate from that array.
    """
    for op in program.ops:
        joins = op.name in JOINS and op.outs[0].aval.ndim > 1 and len(op.ins) > 1
        if not (joins and all(value.is_data for value in op.ins[:2])):
            continue
        for one, other in (op.ins[:2], op.ins[1::-1]):
            layer = last_layer(one, linear)
            if layer is not None and not other.comes_from(layer.value):
                layer.joined = True
            if op.name == "mul" and one.comes_from(other):
                for gate in linear:
                    gate.beside_stream |= _is_own(gate.value, one, other)


def _is_own(value: Value, one: Value, other: Value) -> bool:
    return one.comes_from(value) and not other.comes_from(value)


def _sums(program: Program) -> Iterator[tuple[Value, Value, Value]]:
    """The sums of two arrays of data of one shape: both operands, and the sum."""
    for op in program.ops:
        if op.name not in ("add", "add_any") or len(op.ins) != 2 or op.is_derivative:
            continue
        a, b = map(_unconverted, op.ins)
        if a.is_data and b.is_data and a.aval.shape == b.aval.shape:
            yield a, b, op.outs[0]


def _unconverted(value: Value) -> Value:
    """Return the array that was converted: a sum may promote its stream."""
    while value.maker is not None and value.maker.name == "convert_element_type":
        (value,) = value.maker.ins
    return value


def mark_normalised(program: Program, layers, sums) -> None:
    """Find the results whose size a normalisation divides out."""
    known = {site.value: site for site in [*layers, *sums] if site.kind != "norm"}
    for op in program.ops:
        if op.name not in ("rsqrt", "sqrt") or not op.ins[0].is_data:
            continue
        seen, frontier = set(), [(op.ins[0], 0)]
        while frontier:
            value, depth = frontier.pop()
            if value in known:
                known[value].normalised = True
                continue
            if value in seen or depth > 24 or value.maker is None:
                continue
            seen.add(value)
            if value.maker.name in ("dot_general", "conv_general_dilated", "gather"):
                continue
            frontier += [(v, depth + 1) for v in value.maker.ins if v.is_data]
