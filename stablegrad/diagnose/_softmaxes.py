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
                site = Site("attention", "", (), logits, None)
                site.parents = [one for one in (q, k) if one is not None]
                site.extra = {
                    "weights": weights,
                    "unmasked": before_mask(logits),
                }
                if site.parents:
                    found.append(site)
                continue
        layer = next((s for s in linear if s.value is walk_back(logits, s.value)), None)
        if layer is not None and _routes(weights):
            site = Site("router", "", (), logits, layer.source)
            site.parents, site.extra = [layer], {"weights": weights}
            found.append(site)
    return found


def _softmax(op: Op) -> tuple[Value | None, Value | None]:
    """Return logits and weights if an operation is, or starts, a softmax."""
    if op.name == "custom_jvp_call" and "softmax" in str(op.eqn.params.get("name")):
        is_log = "log" in str(op.eqn.params.get("name"))
        return (None, None) if is_log else (op.ins[0], op.outs[0])
    if op.name != "exp" or op.ins[0].maker is None or op.ins[0].maker.name != "sub":
        return None, None
    users = _users(op.outs[0])
    summed = any(user.name == "reduce_sum" for user in users)
    divided = [user for user in users if user.name in ("div", "mul")]
    if not (summed and divided):
        return None, None
    return op.ins[0].maker.ins[0], divided[0].outs[0]


def _users(value: Value) -> list[Op]:
    """The users of a value and of its casts: 16 bits are summed in 32."""
    found = []
    for user in value.users:
        casts = user.name == "convert_element_type"
        found += _users(user.outs[0]) if casts else [user]
    return found


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
            through = (*PASSING, "slice", "select_n", "div", "mul")
            if op.name in through and op not in seen:
                seen.add(op)
                frontier += op.outs
    return False
