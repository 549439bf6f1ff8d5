"""Signals and gradients that grow or shrink with depth."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from .._layers import Layer
from ._rule import Facts, Rule, Verdict, graded

GROWTH = {"warning": 30.0, "critical": 1e4}
WEAK_CHI = 0.5  # Of an activation that no initialisation makes up for.
SOURCE = "Schoenholz et al. (2017), https://arxiv.org/abs/1611.01232"


def severity_of(log_growth: float, limits=GROWTH) -> str:
    return graded(math.exp(min(abs(log_growth), 700.0)), limits)


def log_ratio(first: float, last: float) -> float:
    """log(last / first); of a zero, as if it were the smallest float32."""
    if not (math.isfinite(first) and math.isfinite(last)):
        return 0.0
    return math.log(max(last, 1e-38)) - math.log(max(first, 1e-38))


def hidden(facts: Facts) -> list[Layer]:
    """The path without the head, whose size is a choice."""
    return [layer for layer in facts.path if not facts.is_head(layer)]


def _growths(path: Sequence[Layer]) -> tuple[float, float]:
    """Log growth of the signal, and of the gradient towards the first layer."""
    if len(path) < 3:
        return 0.0, 0.0
    kinds = {layer.kind for layer in path}
    # A recurrence may start with a product of zeros.
    sizes = [layer.rms for layer in path if layer.rms != 0]
    forward = log_ratio(sizes[0], path[-1].rms) if sizes else 0.0
    if kinds >= {"sum", "linear"} or kinds >= {"sum", "conv"}:
        forward = 0.0  # A stream is judged by `residual`.
    return forward, log_ratio(path[-1].gradient_norm, path[0].gradient_norm)


def _span(path: Sequence[Layer]) -> tuple[str, float]:
    """The layer where the gradient changes most, and its share of all change."""
    logs = [
        log_ratio(after.gradient_norm, before.gradient_norm)
        for before, after in itertools.pairwise(path)
    ]
    total = sum(logs)
    same = [x if x * total > 0 else 0.0 for x in logs]
    at = int(np.argmax(np.abs(same)))
    return path[at].name, same[at] / total if total else 0.0


def gain(facts: Facts) -> Iterator[Verdict]:
    path = [x for x in hidden(facts) if x.kind != "sum" and not x.normalised]
    path = [x for x in path if x.gain > 0]
    if len(path) < 3 or len(path) < len(hidden(facts)) / 2:
        return
    forward, backward = _growths(path)
    ratios = [math.log(max(x.gain, 1e-30) / x.right_gain) for x in path]
    predicted = sum(ratios)
    for measured, what in ((backward, "gradient"), (forward, "signal")):
        severity = severity_of(measured)
        if not severity or predicted * measured <= 0:
            continue
        if abs(predicted) < 0.5 * min(abs(measured), 40.0):
            continue
        layer, verb = path[0], "grows" if measured > 0 else "shrinks"
        needed = f"{layer.activation or 'no activation'} needs {layer.right_gain:.3g}"
        usual = float(np.median([x.gain for x in path]))
        yield Verdict(
            rule="gain",
            severity=severity,
            layer="",
            finding=f"The {what} {verb} by "
            f"{math.exp(min(abs(measured), 700)):.2g} over {len(path)} layers, because "
            f"their weights have a gain of {usual:.3g}; {needed}.",
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
            change={
                "multiply": {x.leaf: x.right_gain / x.gain for x in path if x.gain}
            },
        )
        return


def exploding(facts: Facts) -> Iterator[Verdict]:
    yield from _through(facts, "exploding", 1)


def vanishing(facts: Facts) -> Iterator[Verdict]:
    yield from _through(facts, "vanishing", -1)


def _through(facts: Facts, rule: str, sign: int) -> Iterator[Verdict]:
    path = hidden(facts)
    forward, backward = _growths(path)
    severity = severity_of(backward) if backward * sign > 0 else ""
    if severity:
        name, share = _span(path)
        chis = [x.chi for x in path if math.isfinite(x.chi) and x.chi > 0]
        theory = [x.chi_theory for x in path if x.chi_theory > 0]
        mean = lambda xs: float(np.exp(np.mean(np.log(xs)))) if xs else math.nan
        single = share > 0.5
        kind = next((x.activation for x in path if x.activation), "no activation")
        where = f"at {name}" if single else f"over {len(path)} layers"
        word = "grows" if sign > 0 else "shrinks"
        size = math.exp(min(abs(backward), 700))
        why = f"; {kind} gives chi {mean(theory):.3g}" if theory else ""
        yield Verdict(
            rule=rule,
            severity=severity,
            layer=name if single else "",
            finding=f"The gradient {word} by {size:.2g} on the way to the first layer, "
            f"{where}{why}.",
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
    severity = severity_of(forward) if forward * sign > 0 else ""
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


def no_gradient(facts: Facts) -> Iterator[Verdict]:
    """Every element of the gradient is exactly zero."""
    roots = [numbers["gradient"] for numbers in facts.parameters.values()]
    if not math.isfinite(facts.loss) or not roots or any(root != 0 for root in roots):
        return
    first = "In float16, scale the loss. "
    half = any(layer.dtype == "float16" for layer in facts.layers)
    yield Verdict(
        rule="no_gradient",
        severity="critical",
        layer="",
        finding="The gradient of every parameter is exactly zero.",
        evidence={"gradient": 0.0},
        threshold="0",
        source="no step of any optimizer that follows the gradient moves a parameter",
        remedy=first
        * half
        + "Let the loss depend on the parameters: look for `stop_gradient`, "
        "rounding, a clamp that holds every example, or weights of zeros.",
        formula="|dL/dW| > 0",
        code="jax.grad(loss_fn)(params, batch)",
    )


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
            "odd_shard",
        ),
    ),
)
SYMPTOMS = (
    Rule(
        "no_gradient",
        "Does any parameter have a gradient?",
        no_gradient,
        ("vanishing", "rank_collapse", "updates", "epsilon", "noise"),
    ),
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
)
