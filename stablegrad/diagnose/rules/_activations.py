"""Units that no longer learn."""

from collections.abc import Iterator

from ._rule import Facts, Rule, Verdict, graded

DEAD = {"note": 0.3, "warning": 0.5, "critical": 0.9}
SATURATED = {"note": 0.3, "warning": 0.5, "critical": 0.8}
FEWEST_EXAMPLES, ALIKE = 8, 0.9


def _has_examples(facts: Facts) -> bool:
    return not 0 < facts.batch.longest < FEWEST_EXAMPLES


def dead_units(facts: Facts) -> Iterator[Verdict]:
    if not _has_examples(facts):
        return
    for layer in facts.layers:
        if layer.input_rms == 0:  # What is dead comes before it.
            continue
        # Examples that look alike say as little as one, for which half are off.
        usual = 0.5 if layer.alike > ALIKE else 0.0
        severity = graded((layer.dead - usual) / (1 - usual), DEAD)
        if severity and not layer.bounded:
            yield Verdict(
                rule="dead_units",
                severity=severity,
                layer=layer.name,
                finding=f"{layer.dead:.0%} of the units of {layer.name} are dead: "
                f"{layer.activation} has no slope there for any example.",
                evidence={"dead": layer.dead, "mean": layer.mean, "rms": layer.rms},
                threshold=f"{usual + (1 - usual) * DEAD[severity]:.0%}"
                + (", since examples that look alike leave half off" if usual else ""),
                source="Lu et al. (2020), https://arxiv.org/abs/1903.06733",
                remedy="Lower the rate that killed them, set the bias to 0, and use "
                "an activation with a slope below 0.",
                formula="f(x) = max(x, 0.1 x); bias = 0",
                code=f"bias of {layer.name} = 0; nnx.leaky_relu in place of "
                f"{layer.activation}",
                change={"zero_bias": layer.leaf},
            )


def saturated(facts: Facts) -> Iterator[Verdict]:
    for layer in facts.layers:
        # A ReLU6 is flat for half of the usual inputs.
        usual = layer.saturated_usually
        severity = graded((layer.saturated - usual) / max(1 - usual, 1e-6), SATURATED)
        if severity and layer.activation == "sigmoid" and layer.joined:
            severity = "note"  # A gate may stay open or shut.
        if severity and layer.bounded:
            factor = min(1.0, 1.0 / max(layer.rms, 1e-30))
            yield Verdict(
                rule="saturated",
                severity=severity,
                layer=layer.name,
                finding=f"{layer.saturated:.0%} of the elements of {layer.name} lie "
                f"where {layer.activation} is flat (RMS {layer.rms:.3g}, mean "
                f"{layer.mean:.3g}).",
                evidence={
                    "saturated": layer.saturated,
                    "rms": layer.rms,
                    "mean": layer.mean,
                    "input_rms": layer.input_rms,
                },
                threshold=f"{usual + (1 - usual) * SATURATED[severity]:.0%} with a "
                "slope below 6 % of the largest, as |tanh| > 0.97",
                source="Glorot and Bengio (2010), AISTATS",
                remedy="Bring what enters the activation to an RMS of 1: normalise "
                f"it, or multiply {layer.leaf} and its bias by {factor:.3g}.",
                formula=f"W <- W / rms(W x + b) = W / {layer.rms:.3g}",
                code=f"nnx.LayerNorm after {layer.name}",
                change={"multiply": {layer.leaf: factor}, "zero_bias": layer.leaf},
            )


_SYMPTOMS = (
    "no_gradient",
    "vanishing",
    "exploding",
    "rank_collapse",
    "rate",
    "updates",
    "epsilon",
)
RULES = (
    Rule(
        "dead_units",
        "Do units never react?",
        dead_units,
        _SYMPTOMS,
        forward=True,
        applies=_has_examples,
    ),
    Rule("saturated", "Do activations saturate?", saturated, _SYMPTOMS, forward=True),
)
