"""The places of a program to look at: layers, residual sums, attention, routers."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from . import _elementwise
from ._follow import (
    after_bias,
    after_shift,
    is_in_a_norm,
    is_near,
    is_one_hot,
    is_passed_on,
    is_standardised,
)
from ._program import Op, Program, Value, split
from ._site import Site, last_layer
from ._softmaxes import softmaxes
from ._streams import mark_beside, mark_joined, mark_normalised, residual_sums


def find(program: Program, names: Sequence[str]) -> list[Site]:
    """List the sites of a program and of its scans, in forward order."""
    sites = _in_program(program, (), (), {})
    _name(sites, names)
    _find_heads(program, sites)
    return sites


def _find_heads(program: Program, sites: list[Site]) -> None:
    """Note which of the last layers, those that no other follows, a value reaches."""
    own = [x for x in sites if len(x.path) == 1 and x.kind in ("linear", "conv", "sum")]
    scans = [op for op in program.ops if op.body is not None]
    used = [x.source for x in own if x.source is not None]
    used += [value for op in scans for value in op.ins]
    for site in own:
        is_last = not any(value.comes_from(site.value) for value in used)
        if is_last and site.kind != "sum" and site.activation is None:
            site.heads = [site]
    heads = [x for x in own if x.heads]
    for site in own:
        site.heads = [x for x in heads if x.value.comes_from(site.value)]


def _in_program(program: Program, path, sliced, known) -> list[Site]:
    layers: list[Site] = []
    deeper: list[Site] = []
    for op in program.ops:
        if op.body is not None:
            inner = (*sliced, _is_over_layers(op.body))
            found = _in_program(op.body, (*path, op.outs[0].order), inner, known)
            _mark_recurrent(op, found)
            deeper += found
        elif site := _layer(op):
            layers.append(site)
    linear = [site for site in layers if site.kind != "norm"]
    bits = 0
    for site in linear:
        bits |= 1 << site.value.order
    sums = residual_sums(program, bits, layers)
    mark_beside(program, linear)
    mark_joined(program, linear)
    mixed = softmaxes(program, linear)
    mark_normalised(program, layers, sums)
    _attach_activations(program, [*layers, *sums], known)
    _connect(layers)
    own = [*layers, *sums, *mixed]
    for site in own:
        site.dtype = site.dtype or str(site.value.aval.dtype)
        site.path, site.sliced = (*path, site.value.order), sliced
    return sorted([*own, *deeper], key=lambda site: site.path)


def _is_over_layers(body: Program) -> bool:
    """Whether a scan takes the weights of a layer in each of its iterations."""
    layers = filter(None, map(_layer, body.ops))
    inner = [op.body for op in body.ops if op.body is not None]
    own = any(site.weight is not None and site.weight.sliced for site in layers)
    return own or any(map(_is_over_layers, inner))


def _mark_recurrent(op: Op, sites: list[Site]) -> None:
    """Find the layers of a scan's body that take what is carried."""
    assert op.body is not None
    fixed, carried = split(op.eqn)
    state = op.body.ins[fixed : fixed + carried]
    own = set(op.body.values())
    for site in sites:
        if site.source in own and any(site.source.comes_from(x) for x in state):
            site.recurrent = True


def _layer(op: Op) -> Site | None:
    """Return the layer that an operation of data with parameters is.

    None for the operations of a gradient inside the loss.
    """
    if op.is_derivative:
        return None
    data = [value for value in op.ins if value.is_data]
    weights = [value for value in op.ins if value.is_parameter]
    if len(data) != 1 or len(weights) != 1:
        return None
    (source,), (weight,) = data, weights
    out = op.outs[0]
    if op.name == "dot_general" and is_one_hot(source):
        site = Site("embed", out, weight=weight, fan_out=out.aval.shape[-1])
    elif op.name == "dot_general":
        (left, right), batched = op.eqn.params["dimension_numbers"]
        is_left = op.ins[0] is weight
        contracted, batch = (left, batched[0]) if is_left else (right, batched[1])
        shape = weight.aval.shape
        fan_in = int(np.prod([shape[i] for i in contracted]))
        outer = int(np.prod([shape[i] for i in batch]))
        fan_out = int(np.prod(shape)) // max(fan_in * outer, 1)
        free = weight.aval.ndim - len(contracted) - len(batch)
        axis = len(batch) + free - 1 if is_left else out.aval.ndim - 1
        site = Site("linear", out, fan_in=fan_in, fan_out=fan_out, unit_axis=axis)
    elif op.name == "conv_general_dilated":
        spec = op.eqn.params["dimension_numbers"]
        shape = weight.aval.shape
        window = [shape[i] for i in spec.rhs_spec[2:]]
        fan_in = int(shape[spec.rhs_spec[1]] * np.prod(window))
        strides = int(np.prod(op.eqn.params["window_strides"]))
        outputs = shape[spec.rhs_spec[0]] // op.eqn.params["feature_group_count"]
        fan_out = max(int(outputs * np.prod(window)) // strides, 1)
        axis = spec.out_spec[1]
        site = Site("conv", out, fan_in=fan_in, fan_out=fan_out, unit_axis=axis)
    elif op.name == "gather":
        site = Site("embed", out, fan_out=weight.aval.shape[-1])
    elif op.name == "mul" and weight.aval.size > 1 and is_standardised(op):
        site = Site("norm", out)
    else:
        return None
    site.source = None if site.kind == "embed" else source
    site.weight = weight
    site.dtype = str(out.aval.dtype)
    site.value, site.unit_axis = after_bias(site.value, site.unit_axis % out.aval.ndim)
    if site.kind == "norm":
        site.value = after_shift(out)
    return site


def _attach_activations(program: Program, sites: list[Site], known) -> None:
    """Give every activation to the layer that comes right before it."""
    at: Callable = {site.value: site for site in sites}.get
    inside: set[Value] = set()
    for value in program.values():
        if not value.is_data or value in inside or not value.users:
            continue
        site = at(value)
        before = site or last_layer(value, sites)
        if before is None or (site is None and before.activation is not None):
            continue
        if site is None and not is_near(value, before.value):
            continue
        found = _elementwise.find(program, value)
        if found is None or is_in_a_norm(found.out):
            continue
        if not _elementwise.describe(found, known):
            continue
        feeds_layer = any(s.source and s.source.comes_from(found.out) for s in sites)
        if not feeds_layer and not _goes_on(found.out, program):
            continue
        before.activation = found
        inside.update(out for op in found.ops for out in op.outs)


def _goes_on(value: Value, program: Program) -> bool:
    """Whether a value is carried on to the next iteration."""
    return any(out.comes_from(value) and out.aval.ndim > 0 for out in program.outs)


def _connect(layers: list[Site]) -> None:
    """Note which layer takes the result of which, with nothing but casts between."""
    for site in layers:
        out = site.activation.out if site.activation else site.value
        for other in layers:
            if other.kind == "norm" or other.source is None:
                continue
            if is_passed_on(other.source, out):
                site.feeds.append(other)


def _name(sites: list[Site], names: Sequence[str]) -> None:
    """Name layers after the module of their weight, the others after their layers."""
    for site in sites:
        if site.weight is not None:
            site.leaf = min(site.weight.leaves)
    own = [site for site in sites if site.weight is not None]
    weights: dict[str, set[int]] = {}
    for site in own:
        weights.setdefault(names[site.leaf].rpartition(".")[0], set()).add(site.leaf)
    uses: dict[str, int] = {}
    for site in own:
        parent = names[site.leaf].rpartition(".")[0]
        alone = parent and len(weights[parent]) == 1
        name = parent if alone else names[site.leaf]
        uses[name] = uses.get(name, 0) + 1
        site.name = name if uses[name] == 1 else f"{name} (use {uses[name]})"
    for site in sites:
        if site.weight is None:
            shared = _common([parent.name for parent in site.parents])
            site.name = f"{shared} ({site.kind})"


def _common(names: list[str]) -> str:
    """Return the module that holds all of these."""
    if len(set(names)) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared) or names[0]


def leaves_in_whole_operations(program: Program) -> frozenset[int]:
    """Return the parameters that enter operations with a program of their own.

    Those of scans are looked at; branches and others stay single operations.
    """
    found = frozenset()
    for op in program.ops:
        if op.body is not None:
            found |= leaves_in_whole_operations(op.body)
        elif any(map(_is_jaxpr, jax.tree.leaves(op.eqn.params, is_leaf=_is_jaxpr))):
            found |= frozenset().union(*(v.leaves for v in op.ins if v.is_parameter))
    return found


def _is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")
