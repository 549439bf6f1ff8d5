"""The places of a program to look at: layers, residual sums, attention, routers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _elementwise
from ._elementwise import PASSING, Activation
from ._program import Op, Program, Value

MOST_EXPERTS = 512


@dataclasses.dataclass(eq=False)
class Site:
    """A place; what it measures is told apart by `kind`."""

    kind: str  # linear, conv, embed, norm, sum, attention or router
    name: str
    path: tuple[int, ...]  # Its order, within each of the scans that hold it.
    value: Value  # Its result, after the bias.
    source: Value | None = None  # What it is applied to.
    weight: Value | None = None
    leaf: int = -1  # The parameter that it is named after.
    fan_in: int = 1
    fan_out: int = 1
    unit_axis: int = -1
    activation: Activation | None = None
    normalised: bool = False  # Whether a normalisation takes the result.
    branch: bool = False  # Whether the result is added to a residual stream.
    within: bool = False  # Whether it lies beside a residual stream.
    feeds: list["Site"] = dataclasses.field(default_factory=list)
    parents: list["Site"] = dataclasses.field(default_factory=list)
    dtype: str = ""  # Of the operation, before any cast of its result.
    recurrent: bool = False  # Whether it takes what an iteration hands to the next.
    sliced: tuple[bool, ...] = ()  # For each scan around it: over layers, not time.
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def find(program: Program, names: Sequence[str]) -> list[Site]:
    """List the sites of a program and of its scans, in forward order."""
    sites = _in_program(program, (), (), {})
    _name(sites, names)
    return sites


def _in_program(program: Program, path, sliced, known) -> list[Site]:
    layers: list[Site] = []
    deeper: list[Site] = []
    for op in program.ops:
        if op.body is not None:
            over_layers = any(value.sliced for value in op.body.ins)
            inner = (*sliced, over_layers)
            found = _in_program(op.body, (*path, op.outs[0].order), inner, known)
            _mark_recurrent(op, found)
            deeper += found
        elif site := _layer(op):
            layers.append(site)
    linear = [site for site in layers if site.kind != "norm"]
    bits = 0
    for site in linear:
        bits |= 1 << site.value.order
    sums = _residual_sums(program, bits, layers)
    softmaxes = _softmaxes(program, linear)
    _mark_normalised(program, layers, sums)
    _attach_activations(program, [*layers, *sums], known)
    _connect(program, layers, sums)
    own = [*layers, *sums, *softmaxes]
    for site in own:
        site.dtype = site.dtype or str(site.value.aval.dtype)
        site.path, site.sliced = (*path, site.value.order), sliced
    return sorted([*own, *deeper], key=lambda site: site.path)


def _mark_recurrent(op: Op, sites: list[Site]) -> None:
    """Find the layers of a scan's body that take what is carried."""
    assert op.body is not None
    fixed, carried = op.eqn.params["num_consts"], op.eqn.params["num_carry"]
    state = op.body.ins[fixed : fixed + carried]
    own = set(op.body.values())
    for site in sites:
        if site.source in own and any(site.source.comes_from(x) for x in state):
            site.recurrent = True


def _layer(op: Op) -> Site | None:
    """Return the layer that an operation of data with parameters is."""
    data = [value for value in op.ins if value.is_data]
    weights = [value for value in op.ins if value.is_parameter]
    if len(data) != 1 or len(weights) != 1:
        return None
    (source,), (weight,) = data, weights
    out = op.outs[0]
    if op.name == "dot_general":
        (left, right), (_, batched) = op.eqn.params["dimension_numbers"]
        is_left = op.ins[0] is weight
        contracted = left if is_left else right
        shape = weight.aval.shape
        fan_in = int(np.prod([shape[i] for i in contracted]))
        batch = (op.eqn.params["dimension_numbers"][1][0 if is_left else 1]) or ()
        outer = int(np.prod([shape[i] for i in batch]))
        fan_out = int(np.prod(shape)) // max(fan_in * outer, 1)
        free = weight.aval.ndim - len(contracted) - len(batch)
        axis = len(batch) + free - 1 if is_left else out.aval.ndim - 1
        del batched
        site = Site("linear", "", (), out, source, weight, -1, fan_in, fan_out, axis)
    elif op.name == "conv_general_dilated":
        spec = op.eqn.params["dimension_numbers"]
        shape = weight.aval.shape
        window = [shape[i] for i in spec.rhs_spec[2:]]
        fan_in = int(shape[spec.rhs_spec[1]] * np.prod(window))
        strides = int(np.prod(op.eqn.params["window_strides"]))
        fan_out = max(int(shape[spec.rhs_spec[0]] * np.prod(window)) // strides, 1)
        axis = spec.out_spec[1]
        site = Site("conv", "", (), out, source, weight, -1, fan_in, fan_out, axis)
    elif op.name == "gather":
        site = Site("embed", "", (), out, None, weight, -1, 1, weight.aval.shape[-1])
    elif op.name == "mul":
        site = Site("norm", "", (), out, source, weight)
    else:
        return None
    site.dtype = str(out.aval.dtype)
    site.value, site.unit_axis = _after_bias(site.value, site.unit_axis % out.aval.ndim)
    if site.kind == "norm":
        site.value = _after_shift(out)
    return site


def _after_bias(value: Value, axis: int) -> tuple[Value, int]:
    """Follow a result through casts and through sums with parameters."""
    while len(value.users) == 1:
        (op,) = value.users
        others = [v for v in op.ins if v is not value]
        out = op.outs[0]
        if op.name == "transpose":
            axis = list(op.eqn.params["permutation"]).index(axis)
        elif op.name in PASSING and out.aval.size == value.aval.size:
            if out.aval.shape != value.aval.shape:
                kept = out.aval.shape[-1:] == value.aval.shape[-1:]
                if axis != value.aval.ndim - 1 or not kept:
                    break
                axis = out.aval.ndim - 1
        elif not (op.name in ("add", "sub", "mul") and _all_parameters(others)):
            break
        if not np.issubdtype(np.dtype(out.aval.dtype), np.inexact) and str(
            out.aval.dtype
        ) not in ("bfloat16", "float16"):
            break
        value = out
    return value, axis


def _all_parameters(values: list[Value]) -> bool:
    return len(values) == 1 and values[0].is_parameter


def _after_shift(value: Value) -> Value:
    """Follow a scaled result to the sum with the shift, or to the last product."""
    last = value
    for _ in range(8):
        if len(value.users) != 1:
            break
        (op,) = value.users
        others = [v for v in op.ins if v is not value]
        if op.name in ("add", "sub"):
            return op.outs[0] if _all_parameters(others) else last
        if op.name not in (*PASSING, "mul", "div"):
            break
        value = op.outs[0]
        if value.aval.size >= last.aval.size:
            last = value
    return last


def _residual_sums(program: Program, linear_bits: int, layers) -> list[Site]:
    """Sums x + f(x) with a layer in f."""
    found = []
    for op in program.ops:
        if op.name not in ("add", "add_any") or len(op.ins) != 2:
            continue
        a, b = op.ins
        if not (a.is_data and b.is_data and a.aval.shape == b.aval.shape):
            continue
        for x, f in ((a, b), (b, a)):
            between = f.ancestors & ~x.ancestors & linear_bits
            if f.comes_from(x) and between and f.aval.ndim > 1:
                branch = _last_layer(f, layers)
                if branch is None:
                    continue
                branch.branch = True
                for layer in layers:
                    beside = f.comes_from(layer.value) and not x.comes_from(layer.value)
                    layer.within |= beside
                site = Site("sum", "", (), op.outs[0], x, None)
                site.extra, site.parents = {"branch": f}, [branch]
                found.append(site)
                break
    return found


def _last_layer(value: Value, layers: Sequence[Site]) -> Site | None:
    """Return the deepest layer that a value is made of."""
    before = [site for site in layers if value.comes_from(site.value)]
    return max(before, key=lambda site: site.value.order, default=None)


def _softmaxes(program: Program, linear: list[Site]) -> list[Site]:
    found = []
    for op in program.ops:
        logits, weights = _softmax(op)
        if logits is None or weights is None or not logits.is_data:
            continue
        made_by = _walk_back(logits)
        if made_by.maker is not None and made_by.maker.name == "dot_general":
            sides = [value for value in made_by.maker.ins if value.is_data]
            if len(sides) == 2:
                q, k = (_last_layer(side, linear) for side in sides)
                site = Site("attention", "", (), logits, None)
                site.parents = [one for one in (q, k) if one is not None]
                site.extra = {"weights": weights, "dim": _contracted(made_by.maker)}
                if site.parents:
                    found.append(site)
                continue
        layer = next((s for s in linear if s.value is _walk_back(logits, s.value)), None)
        if layer is not None and _routes(weights):
            site = Site("router", "", (), logits, layer.source)
            site.parents, site.extra = [layer], {"weights": weights}
            found.append(site)
    return found


def _contracted(op: Op) -> int:
    (left, _), _ = op.eqn.params["dimension_numbers"]
    return int(np.prod([op.ins[0].aval.shape[i] for i in left]))


def _softmax(op: Op) -> tuple[Value | None, Value | None]:
    """Return logits and weights if an operation is, or starts, a softmax."""
    if op.name == "custom_jvp_call" and "softmax" in str(op.eqn.params.get("name")):
        is_log = "log" in str(op.eqn.params.get("name"))
        return (None, None) if is_log else (op.ins[0], op.outs[0])
    if op.name != "exp" or op.ins[0].maker is None or op.ins[0].maker.name != "sub":
        return None, None
    summed = any(user.name == "reduce_sum" for user in op.outs[0].users)
    divided = [user for user in op.outs[0].users if user.name in ("div", "mul")]
    if not (summed and divided):
        return None, None
    return op.ins[0].maker.ins[0], divided[0].outs[0]


def _walk_back(value: Value, stop: Value | None = None) -> Value:
    """Follow logits back through masks, scales and casts."""
    through = (*PASSING, "mul", "div", "add", "select_n", "tanh", "where", "max")
    while value is not stop and value.maker is not None:
        if value.maker.name not in through:
            break
        before = [v for v in value.maker.ins if v.is_data and v.aval.dtype != bool]
        if len(before) != 1:
            break
        value = before[0]
    return value


def _routes(weights: Value) -> bool:
    """Whether the weights of a softmax choose or mix, rather than enter a loss."""
    if weights.aval.shape[-1] > MOST_EXPERTS:
        return False
    seen, frontier = set(), [weights]
    while frontier:
        value = frontier.pop()
        for op in value.users:
            if op.name in ("top_k", "argmax", "sort", "dot_general", "scan"):
                return True
            if op.name == "mul" and all(v.is_data for v in op.ins):
                return True
            if op.name in (*PASSING, "slice", "select_n", "div") and op not in seen:
                seen.add(op)
                frontier += op.outs
    return False


def _mark_normalised(program: Program, layers, sums) -> None:
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


def _attach_activations(program: Program, sites: list[Site], known) -> None:
    """Give every activation to the layer that comes right before it."""
    at: Callable = {site.value: site for site in sites}.get
    inside: set[Value] = set()
    for value in program.values():
        if not value.is_data or value in inside or not value.users:
            continue
        site = at(value)
        before = site or _last_layer(value, sites)
        if before is None or (site is None and before.activation is not None):
            continue
        if site is None and not _is_near(value, before.value):
            continue
        found = _elementwise.find(program, value)
        if found is None or not _elementwise.describe(found, known):
            continue
        feeds_layer = any(s.source and s.source.comes_from(found.out) for s in sites)
        if not feeds_layer and not _goes_on(found.out, program):
            continue
        before.activation = found
        inside.update(out for op in found.ops for out in op.outs)


_NEAR = frozenset(
    "add sub mul div slice split concatenate select_n dynamic_slice pad max "
    "reduce_window_max reduce_window_sum".split()
) | frozenset(PASSING)


def _is_near(value: Value, source: Value) -> bool:
    """Whether a value is a sum or a piece of `source`."""
    seen, frontier = set(), [value]
    while frontier:
        value = frontier.pop()
        if value is source:
            return True
        if value.maker is not None and value.maker.name in _NEAR and value not in seen:
            seen.add(value)
            frontier += [v for v in value.maker.ins if v.is_data]
    return False


def _goes_on(value: Value, program: Program) -> bool:
    """Whether a value is carried on to the next iteration."""
    return any(out.comes_from(value) and out.aval.ndim > 0 for out in program.outs)


def _connect(program: Program, layers: list[Site], sums: list[Site]) -> None:
    """Note which layer takes the result of which, with nothing but casts between."""
    for site in layers:
        out = site.activation.out if site.activation else site.value
        for other in layers:
            if other.kind == "norm" or other.source is None:
                continue
            if _walk_to(other.source, out):
                site.feeds.append(other)


def _walk_to(value: Value, target: Value) -> bool:
    while value is not target:
        if value.maker is None or value.maker.name not in PASSING:
            return False
        before = [v for v in value.maker.ins if v.is_data]
        if len(before) != 1:
            return False
        value = before[0]
    return True


def _name(sites: list[Site], names: Sequence[str]) -> None:
    """Name layers after the module of their weight, the others after their layers."""
    own = [site for site in sites if site.weight is not None]
    for site in own:
        sized = sorted(site.weight.leaves) if site.weight else []
        site.leaf = sized[0]
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
