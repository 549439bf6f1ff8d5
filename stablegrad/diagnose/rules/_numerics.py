"""Values that are not finite, and those that 16 bits do not hold."""

import math
from collections.abc import Iterator

from .._taps import FLOAT16_LARGEST
from ._rule import Facts, Rule, Verdict

FLOAT16_HEADROOM = FLOAT16_LARGEST / 8
FLOAT16_GRADIENT = 2.0**-20  # RMS; float16 rounds below 2^-25 to zero.


def nonfinite_parameters(facts: Facts) -> Iterator[Verdict]:
    for name, numbers in facts.parameters.items():
        if numbers["nonfinite"]:
            yield Verdict(
                rule="nonfinite_parameters",
                severity="critical",
                layer=name,
                finding=f"The parameter {name} is nan or infinite in "
                f"{numbers['nonfinite']:.0f} of {numbers['size']:.0f} elements.",
                evidence={"elements": numbers["nonfinite"]},
                threshold="0 elements",
                source="definition",
                remedy="Restore a checkpoint from before, and guard the optimizer.",
                formula="params_t+1 = params_t where the step is not finite",
                code="tx = sg.stabilize(tx)",
            )


def nonfinite_values(facts: Facts) -> Iterator[Verdict]:
    clean = "the batch"
    for layer in facts.layers:
        comes_in = layer.input_nonfinite and clean == "the batch"
        if comes_in and not layer.nonfinite:
            return
        count = layer.nonfinite or layer.output_nonfinite
        if not count:
            if math.isfinite(layer.rms):
                clean = layer.name
            continue
        after = "" if layer.nonfinite else f" (after {layer.activation})"
        half = layer.dtype == "float16"
        at = f", first in {facts.origin}" if facts.origin else ""
        where = f"{layer.name}{after} is the shallowest bad tensor, "
        where += "and so is its input" if comes_in else f"{clean} the last clean one"
        rule = "overflow16" if half else "nonfinite_values"
        yield Verdict(
            rule=rule,
            severity="critical",
            layer=layer.name,
            finding=f"{count:.0f} values are not finite: {where}{at}.",
            evidence={"values": count, "input_rms": layer.input_rms},
            threshold=f"|x| <= {FLOAT16_LARGEST:.0f}" if half else "0 values",
            source="IEEE 754 binary16" if half else "definition",
            remedy=f"Compute {layer.name} in bfloat16 or float32, or scale its weights."
            if half
            else "Keep the named operation away from the edge of its domain.",
            formula="bfloat16 holds 3.4e38, float16 65504"
            if half
            else "log(x + e), sqrt(x + e), x / max(|x|, e)",
            code="nnx.Linear(..., dtype=jnp.bfloat16)"
            if half
            else "x = jnp.where(ok, x, safe)  # before the operation, not after it",
            change={"dtype": layer.name} if half else {},
        )
        return
    if not math.isfinite(facts.loss):
        at = f" It comes from {facts.origin}." if facts.origin else ""
        yield Verdict(
            rule="nonfinite_values",
            severity="critical",
            layer="loss",
            finding=f"The loss is {facts.loss}; every layer is finite, {clean} the "
            f"last clean tensor.{at}",
            evidence={"loss": facts.loss},
            threshold="a finite loss",
            source="definition",
            remedy="Write the loss on logits, which has no logarithm of 0.",
            formula="-log softmax(z)_y = logsumexp(z) - z_y",
            code="optax.softmax_cross_entropy_with_integer_labels(logits, labels)",
        )


def nonfinite_gradients(facts: Facts) -> Iterator[Verdict]:
    if not math.isfinite(facts.loss) or any(x.nonfinite for x in facts.layers):
        return
    bad = [layer for layer in facts.layers if layer.gradient_nonfinite]
    own = [
        name
        for name, numbers in facts.parameters.items()
        if not (numbers["nonfinite"] or math.isfinite(numbers["gradient"]))
    ]
    if bad:
        last = bad[-1]
        later = facts.layers[facts.layers.index(last) + 1 :]
        name, clean = last.name, later[0].name if later else "the loss"
        where = f"on the way back {clean} is the last clean tensor, {name} the first "
        where += "bad one"
    elif own:
        name = own[0]
        where = f"that of the parameter {name} is nan or infinite, and that of every "
        where += "layer's result is finite"
    else:
        return
    yield Verdict(
        rule="nonfinite_gradients",
        severity="critical",
        layer=name,
        finding=f"The loss is finite and its gradient is not: {where}.",
        evidence={"layers": float(len(bad)), "parameters": float(len(own))},
        threshold="0 elements",
        source="definition",
        remedy="Look for a square root, norm, power or division at 0 "
        + ("between the two." if bad else "of this parameter."),
        formula="d sqrt(x) / dx = 1 / (2 sqrt(x)) is infinite at 0",
        code="jnp.sqrt(jnp.where(x > 0, x, 1.0)) * (x > 0)",
    )


def overflow16(facts: Facts) -> Iterator[Verdict]:
    for layer in facts.layers:
        if layer.dtype != "float16" or layer.nonfinite:
            continue
        if layer.largest > FLOAT16_HEADROOM:
            yield Verdict(
                rule="overflow16",
                severity="warning",
                layer=layer.name,
                finding=f"Values of {layer.name} reach {layer.largest:.3g}, and "
                "float16 ends at 65504.",
                evidence={"largest": layer.largest},
                threshold=f"{FLOAT16_HEADROOM:.0f}, an eighth of the largest float16",
                source="IEEE 754 binary16",
                remedy=f"Compute {layer.name} in bfloat16 or float32.",
                formula="bfloat16 holds 3.4e38, float16 65504",
                code="nnx.Linear(..., dtype=jnp.bfloat16)",
                change={"dtype": layer.name},
            )
            return


def underflow16(facts: Facts) -> Iterator[Verdict]:
    small = [
        layer
        for layer in facts.layers
        if layer.dtype == "float16" and 0 < layer.gradient_rms < FLOAT16_GRADIENT
    ]
    if not small:
        return
    layer = min(small, key=lambda x: x.gradient_rms)
    factor = 2.0 ** min(15, round(math.log2(2e-3 / layer.gradient_rms)))
    yield Verdict(
        rule="underflow16",
        severity="warning",
        layer=layer.name,
        finding=f"Gradients at {layer.name} have an RMS of {layer.gradient_rms:.2g}; "
        "float16 makes zeros of what is below 3e-8.",
        evidence={"gradient_rms": layer.gradient_rms, "layers": float(len(small))},
        threshold=f"RMS {FLOAT16_GRADIENT:.2g}",
        source="Micikevicius et al. (2018), https://arxiv.org/abs/1710.03740",
        remedy="Scale the loss up, and the gradients down again in float32.",
        formula=f"grad = grad(scale * loss) / scale, scale = {factor:g}",
        code=f"jax.grad(lambda p: {factor:g} * loss(p)), then divide in float32",
        change={"loss_scale": factor},
    )


RULES = (
    Rule(
        "nonfinite_parameters",
        "Are the parameters finite?",
        nonfinite_parameters,
        ("nonfinite_values", "nonfinite_gradients", "rate", "dead_units"),
    ),
    Rule(
        "nonfinite_values",
        "Is every tensor of the forward pass finite?",
        nonfinite_values,
        (
            "nonfinite_gradients",
            "rate",
            "overflow16",
            "underflow16",
            "dead_units",
            "vanishing",
            "odd_shard",
        ),
    ),
    Rule(
        "nonfinite_gradients",
        "Is every tensor of the backward pass finite?",
        nonfinite_gradients,
        ("rate",),
    ),
    Rule(
        "overflow16", "Do values fit into float16?", overflow16, ("rate",), forward=True
    ),
    Rule("underflow16", "Do gradients fit into float16?", underflow16, ()),
)
