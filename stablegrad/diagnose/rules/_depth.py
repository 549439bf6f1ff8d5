"""Signals and gradients that grow or shrink with depth or with time."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .._layers import Layer
from ._rule import Facts, Rule, Verdict

GROWTH = {"warning": 30.0, "critical": 1e4}
BRANCH, BRANCH_AGAINST_PEERS = 4.0, 3.0
STREAM = 30.0
WEAK_CHI = 0.5  # Of an activation that no initialisation makes up for.
TIME = {"warning": 100.0, "critical": 1e6}
ALIKE, ALIKE_OF_INPUTS = 0.98, 0.05
SOURCE = "Schoenholz et al. (2017), https://arxiv.org/abs/1611.01232"


def _severity(log_growth: float, limits=GROWTH) -> str:
    size = math.exp(min(abs(log_growth), 700.0))
    reached = [name for name in ("warning", "critical") if size >= limits[name]]
    return reached[-1] if reached else ""


def _log_ratio(first: float, last: float) -> float:
    """log(last / first); of a zero, as if it were the smallest float32."""
    if not (math.isfinite(first) and math.isfinite(last)):
        return 0.0
    return math.log(max(last, 1e-38)) - math.log(max(first, 1e-38))


def _hidden(facts: Facts) -> list[Layer]:
    """The path without the head, whose size is a choice."""
    return [layer for layer in facts.path if not facts.is_head(layer)]


def _growths(path: Sequence[Layer]) -> tuple[float, float]:
    """Log growth of the signal, and of the gradient towards the first layer."""
    if len(path) < 3:
        return 0.0, 0.0
    kinds = {layer.kind for layer in path}
    forward = _log_ratio(path[0].rms, path[-1].rms)
    if kinds >= {"sum", "linear"} or kinds >= {"sum", "conv"}:
        forward = 0.0  # A stream is judged by `residual`.
    return forward, _log_ratio(path[-1].gradient_norm, path[0].gradient_norm)


def _span(path: Sequence[Layer]) -> tuple[str, float, list[float]]:
    """The layer where the gradient changes most, and its share of all change."""
    logs = [
        _log_ratio(after.gradient_norm, before.gradient_norm)
        for before, after in zip(path, path[1:], strict=False)
    ]
    total = sum(logs)
    same = [x if x * total > 0 else 0.0 for x in logs]
    at = int(np.argmax(np.abs(same)))
    return path[at].name, same[at] / total if total else 0.0, logs


def gain(facts: Facts) -> Iterator[Verdict]:
    path = [x for x in _hidden(facts) if x.kind != "sum" and not x.normalised]
    if len(path) < 3 or len(path) < len(_hidden(facts)) / 2:
        return
    forward, backward = _growths(path)
    ratios = [math.log(max(x.gain, 1e-30) / x.right_gain) for x in path]
    predicted = sum(ratios)
    for measured, what in ((backward, "gradient"), (forward, "signal")):
        severity = _severity(measured)
        if not severity or predicted * measured <= 0:
            continue
        if abs(predicted) < 0.5 * min(abs(measured), 40.0):
            continue
        layer = path[0]
        usual = float(np.median([x.gain for x in path]))
        yield Verdict(
            rule="gain",
            severity=severity,
            layer="",
            finding=f"The {what} {'grows' if measured > 0 else 'shrinks'} by "
            f"{math.exp(abs(measured)):.2g} over {len(path)} layers, because their "
            f"weights have a gain of {usual:.3g}; {layer.activation or 'no activation'} "
            f"needs {layer.right_gain:.3g}.",
            evidence={
                "growth": math.exp(min(measured, 700)),
                "explained_by_gains": math.exp(min(predicted, 700)),
                "gain": usual,
                "right_gain": layer.right_gain,
            },
            threshold=f"{GROWTH[severity]:g} in all, half of it by the gains",
            source=f"{SOURCE}; gains by quadrature",
            remedy="Initialise all of these layers with the gain of their activation.",
            formula=f"std = gain / sqrt(fan_in), gain = 1 / sqrt(E[f(z)^2]) = "
            f"{layer.right_gain:.3g}",
            code="kernel_init=jax.nn.initializers.variance_scaling("
            f"{layer.right_gain**2:.3g}, 'fan_in', 'normal')",
            change={"multiply": {x.leaf: x.right_gain / x.gain for x in path if x.gain}},
        )
        return


def residual(facts: Facts) -> Iterator[Verdict]:
    sums = [x for x in facts.layers if x.kind == "sum" and math.isfinite(x.branch)]
    for layer in sums:
        others = [x.branch for x in sums if x is not layer]
        usual = float(np.median(others)) if others else 1.0
        # The first branch may well outweigh what enters the stream.
        limit = BRANCH * max(1.0, BRANCH_AGAINST_PEERS / BRANCH * usual)
        if layer.branch > limit and layer is not sums[0]:
            yield _branch(layer, usual)
        elif layer is sums[0] and layer.branch > 4 * limit:
            yield _branch(layer, usual)
    streams = [x for x in sums if x.branch > 0]
    if len(streams) < 4:
        return
    growth = _log_ratio(streams[0].input_rms, streams[-1].rms)
    if growth > math.log(STREAM) and np.median([x.branch for x in streams]) > 0.5:
        factor = 1 / math.sqrt(len(streams))
        yield Verdict(
            rule="residual",
            severity="critical" if growth > math.log(100 * STREAM) else "warning",
            layer=streams[0].name,
            finding=f"The residual stream grows by {math.exp(growth):.3g} over "
            f"{len(streams)} branches: each adds about as much as it is given.",
            evidence={
                "growth": math.exp(growth),
                "branch": float(np.median([x.branch for x in streams])),
            },
            threshold=f"{STREAM:g} in all",
            source="Zhang et al., Fixup (2019), https://arxiv.org/abs/1901.09321; "
            "GPT-2 (2019)",
            remedy=f"Multiply the last weights of every branch by {factor:.3g}.",
            formula=f"x + s f(x), s = 1 / sqrt(branches) = 1 / sqrt({len(streams)})",
            code=f"x = x + {factor:.3g} * f(x)",
            change={"multiply_branches": factor},
        )


def _branch(layer: Layer, usual: float) -> Verdict:
    factor = max(usual, 0.1) / layer.branch
    return Verdict(
        rule="residual",
        severity="critical" if layer.branch > 50 else "warning",
        layer=layer.parents[0],
        finding=f"The branch that ends in {layer.parents[0]} adds {layer.branch:.3g} "
        f"times what the residual stream holds; the others add {usual:.3g} times.",
        evidence={"branch": layer.branch, "median_of_others": usual},
        threshold=f"{BRANCH:g}, and {BRANCH_AGAINST_PEERS:g} times the median",
        source="De and Smith, SkipInit (2020), https://arxiv.org/abs/2002.10444",
        remedy=f"Multiply the branch by {factor:.3g}.",
        formula="x + s f(x), rms(s f(x)) <= rms(x)",
        code=f"x = x + {factor:.3g} * f(x)",
        change={"branch": {layer.parents[0]: factor}},
    )


def exploding(facts: Facts) -> Iterator[Verdict]:
    yield from _through(facts, "exploding", 1)


def vanishing(facts: Facts) -> Iterator[Verdict]:
    yield from _through(facts, "vanishing", -1)


def _through(facts: Facts, rule: str, sign: int) -> Iterator[Verdict]:
    path = _hidden(facts)
    forward, backward = _growths(path)
    severity = _severity(backward) if backward * sign > 0 else ""
    if severity:
        name, share, _ = _span(path)
        chis = [x.chi for x in path if math.isfinite(x.chi) and x.chi > 0]
        theory = [x.chi_theory for x in path if x.chi_theory > 0]
        mean = lambda xs: float(np.exp(np.mean(np.log(xs)))) if xs else math.nan
        single = share > 0.5
        kind = next((x.activation for x in path if x.activation), "no activation")
        where = f"at {name}" if single else f"over {len(path)} layers"
        word = "grows" if sign > 0 else "shrinks"
        yield Verdict(
            rule=rule,
            severity=severity,
            layer=name if single else "",
            finding=f"The gradient {word} by {math.exp(min(abs(backward), 700)):.2g} on "
            f"the way to the first layer, {where}; {kind} gives chi {mean(theory):.3g}.",
            evidence={
                "growth": math.exp(max(min(backward, 700), -700)),
                "chi": mean(chis),
                "chi_theory": mean(theory),
            },
            threshold=f"{GROWTH[severity]:g} in all",
            source=SOURCE,
            remedy="Normalise every layer or add skip connections; or take an "
            "activation whose chi is 1, with its gain.",
            formula="chi = fan_out rms(W)^2 E[f'(z)^2] = 1: ReLU with gain 1.41",
            code="x = x + block(nnx.LayerNorm(...)(x))",
            change={"architecture": "normalise"}
            | ({"activation": "relu"} if mean(theory) < WEAK_CHI else {}),
        )
        return
    severity = _severity(forward) if forward * sign > 0 else ""
    normal = any(layer.normalised for layer in path)
    if severity and not normal:
        word = "grows" if sign > 0 else "shrinks"
        yield Verdict(
            rule=rule,
            severity=severity,
            layer="",
            finding=f"The signal {word} by {math.exp(min(abs(forward), 700)):.2g} over "
            f"{len(path)} layers.",
            evidence={"growth": math.exp(forward)},
            threshold=f"{GROWTH[severity]:g} in all",
            source=SOURCE,
            remedy="Normalise every layer, or set every layer's gain (LSUV).",
            formula="W <- W / rms(W x)",
            code="nnx.LayerNorm(...) before every activation",
            change={"architecture": "normalise"},
        )


def through_time(facts: Facts) -> Iterator[Verdict]:
    for layer in facts.weighted:
        if not (layer.recurrent and layer.time_gain > 0):
            continue
        log_growth = math.log(layer.time_gain) * layer.times
        severity = _severity(log_growth, TIME)
        if severity and log_growth > 0:
            radius = layer.time_gain
            yield Verdict(
                rule="through_time",
                severity=severity,
                layer=layer.name,
                finding=f"The gradient grows by {radius:.3g} per step back in time, "
                f"{math.exp(log_growth):.2g} over {layer.times} steps, in {layer.name}.",
                evidence={"per_step": radius, "growth": math.exp(log_growth)},
                threshold=f"{TIME[severity]:g} over the sequence",
                source="Pascanu et al. (2013), https://arxiv.org/abs/1211.5063",
                remedy=f"Divide the recurrent weights by {radius:.3g} (start them "
                "orthogonal), and clip the gradient.",
                formula=f"W_h <- W_h / {radius:.3g}",
                code="kernel_init=jax.nn.initializers.orthogonal(); sg.stabilize(tx)",
                change={"multiply": {layer.leaf: 1 / radius}},
            )
            return


def rank_collapse(facts: Facts) -> Iterator[Verdict]:
    path = [x for x in _hidden(facts) if math.isfinite(x.alike)]
    if len(path) < 3:
        return
    start = min(path[0].alike, 0.999)
    for layer in path[1:]:
        if layer.alike > ALIKE and (1 - layer.alike) < ALIKE_OF_INPUTS * (1 - start):
            yield Verdict(
                rule="rank_collapse",
                severity="warning",
                layer=layer.name,
                finding=f"From {layer.name} on all examples look alike: their mean "
                f"cosine is {layer.alike:.4f}, {start:.2f} in the first layer.",
                evidence={"alike": layer.alike, "first": start},
                threshold=f"{ALIKE:g}, and {ALIKE_OF_INPUTS:g} of the first layer's "
                "distance from 1",
                source="Dong et al. (2021), https://arxiv.org/abs/2103.03404",
                remedy="Add skip connections, or normalise over the batch.",
                formula="x + f(x)",
                code="x = x + block(x)",
                change={"architecture": "skip"},
            )
            return


CAUSES = (
    Rule(
        "gain",
        "Do all layers have the gain of their activation?",
        gain,
        (
            "saturated",
            "exploding",
            "vanishing",
            "rank_collapse",
            "rate",
            "epsilon",
            "dead_units",
            "overflow16",
            "updates",
        ),
    ),
    Rule(
        "through_time",
        "Does the gradient explode through time?",
        through_time,
        ("exploding", "rate", "odd_shard", "saturated", "gain"),
    ),
    Rule(
        "residual",
        "Do residual branches add no more than they are given?",
        residual,
        ("exploding", "vanishing", "rank_collapse", "overflow16", "rate", "updates"),
    ),
)
SYMPTOMS = (
    Rule(
        "exploding",
        "Does the gradient grow with depth?",
        exploding,
        ("rate", "rank_collapse", "updates"),
    ),
    Rule(
        "vanishing",
        "Does the gradient shrink with depth?",
        vanishing,
        ("epsilon", "rank_collapse", "updates"),
    ),
    Rule("rank_collapse", "Do examples stay apart?", rank_collapse),
)
