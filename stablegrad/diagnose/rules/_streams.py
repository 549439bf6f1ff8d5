"""Residual streams, recurrence, and examples that come to look alike."""

import math
from collections.abc import Iterator

import numpy as np

from .._layers import Layer
from ._depth import hidden, log_ratio, severity_of
from ._rule import Facts, Rule, Verdict

BRANCH, BRANCH_AGAINST_PEERS = 4.0, 3.0
STREAM = 30.0
TIME = {"warning": 100.0, "critical": 1e6}
ALIKE, ALIKE_OF_INPUTS = 0.98, 0.05


def residual(facts: Facts) -> Iterator[Verdict]:
    sums = [x for x in facts.layers if x.kind == "sum" and math.isfinite(x.branch)]
    found = False
    for layer in sums:
        others = [x.branch for x in sums if x is not layer]
        usual = float(np.median(others)) if others else 1.0
        # The first branch may well outweigh what enters the stream.
        limit = BRANCH * max(1.0, BRANCH_AGAINST_PEERS / BRANCH * usual)
        limit *= 4.0 if layer.starts_stream else 1.0
        if layer.branch > limit:
            found = True
            yield _branch(layer, usual)
    if found:
        return
    streams = [x for x in sums if x.branch > 0]
    if len(streams) < 4:
        return
    growth = log_ratio(streams[0].input_rms, streams[-1].rms)
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


def through_time(facts: Facts) -> Iterator[Verdict]:
    for layer in facts.weighted:
        if not (layer.recurrent and layer.time_gain > 0):
            continue
        log_growth = math.log(layer.time_gain) * layer.times
        severity = severity_of(log_growth, TIME)
        if severity and log_growth > 0:
            radius = layer.time_gain
            yield Verdict(
                rule="through_time",
                severity=severity,
                layer=layer.name,
                finding=f"The gradient grows by {radius:.3g} per step back in time, "
                f"{math.exp(min(log_growth, 700)):.2g} over {layer.times} steps, in "
                f"{layer.name}.",
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
    path = [x for x in hidden(facts) if math.isfinite(x.alike)]
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
        forward=True,
    ),
)
SYMPTOMS = (
    Rule("rank_collapse", "Do examples stay apart?", rank_collapse, forward=True),
)
