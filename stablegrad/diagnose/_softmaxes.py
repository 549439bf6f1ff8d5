"""Attention and routers, found by their softmax."""

from ._elementwise import PASSING
from ._follow import before_mask, walk_back
from ._program import Op, Program, Value
from ._site import Site, last_layer

MOST_EXPERTS = 512


def softmaxes(program: Program, linear: list[Site]) -> list[Site]:
    found = []
    for op in program.ops:
        logits, weights = _softmax(op)
        if logits is None or weights is None or not logits.is_data:
            continue
        made_by = walk_back(logits)
        if made_by.maker is not None and made_by.maker.name == "dot_general":
            sides = [value for value in made_by.maker.ins if value.is_data]
            if len(sides) == 2:
                q, k = (last_layer(side, linear) for side in sides)
                site = Site("attention", logits)
                site.parents = [one for one in (q, k) if one is not None]
                site.extra = {
                    "weights": weights,
                    "unmasked": before_mask(logits),
                }
                if site.parents:
                    found.append(site)
                continue
        layer = next((s for s in linear if s.value is walk_back(logits, s.value)), None)
        if layer is not None and _routes(weights, layer, linear):
            site = Site("router", logits, source=layer.source)
            site.parents, site.extra = [layer], {"weights": weights}
            found.append(site)
    return found


def _softmax(op: Op) -> tuple[Value | None, Value | None]:
    """Return logits and weights if an operation is, or starts, a softmax.

    One over another axis than the last neither attends nor routes: it pools.
    """
    if op.name == "custom_jvp_call" and "softmax" in str(op.eqn.params.get("name")):
        is_log = "log" in str(op.eqn.params.get("name"))
        sums = op.eqn.params["call_jaxpr"].jaxpr.eqns
        is_log |= not any(_sums_last(e, op.ins[0].aval.ndim) for e in sums)
        return (None, None) if is_log else (op.ins[0], op.outs[0])
    if op.name != "exp" or op.ins[0].maker is None or op.ins[0].maker.name != "sub":
        return None, None
    users = _users(op.outs[0])
    summed = any(_sums_last(user.eqn, op.outs[0].aval.ndim) for user in users)
    divided = [user for user in users if user.name in ("div", "mul")]
    if not (summed and divided):
        return None, None
    return op.ins[0].maker.ins[0], divided[0].outs[0]


def _sums_last(eqn, ndim: int) -> bool:
    return eqn.primitive.name == "reduce_sum" and eqn.params["axes"] == (ndim - 1,)


def _users(value: Value) -> list[Op]:
    """The users of a value and of its casts: 16 bits are summed in 32."""
    found = []
    for user in value.users:
        casts = user.name == "convert_element_type"
        found += _users(user.outs[0]) if casts else [user]
    return found


def _routes(weights: Value, layer: Site, linear: list[Site]) -> bool:
    """Whether the weights of a softmax choose or mix layers, not labels of a loss.

    A product with logarithms of the same `layer`'s softmax is an entropy.
    """
    if weights.aval.shape[-1] > MOST_EXPERTS:
        return False
    seen, frontier = set(), [weights]
    while frontier:
        value = frontier.pop()
        for op in value.users:
            if op.name in ("top_k", "argmax", "sort", "scan"):
                return True
            others = [v for v in op.ins if v is not value and v.is_data]
            mixes = op.name in ("mul", "dot_general") and others
            if mixes and last_layer(others[0], linear) not in (None, layer):
                return True
            through = (*PASSING, "slice", "select_n", "div", "mul")
            if op.name in through and op not in seen:
                seen.add(op)
                frontier += op.outs
    return False
