"""Residual sums, and results that a normalisation takes."""

from ._program import Program
from ._site import Site, last_layer


def residual_sums(program: Program, linear_bits: int, layers) -> list[Site]:
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
                branch = last_layer(f, layers)
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
