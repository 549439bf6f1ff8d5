"""Single layers whose weights are far from the size that their place asks for."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .._layers import Layer
from ._rule import Facts, Rule, Verdict

# The gains of the usual initialisations (0.58 in Equinox, 1 in Flax, 1.41 of He) differ
# by at most a factor of 2.4, so they do not explain a factor of 4 from other layers.
LARGE, LARGE_AGAINST_PEERS = 2.5, 4.0
CRITICAL = 8.0
SMALL, SMALL_AGAINST_PEERS = 4.0, 4.0
SCALE = 4.0  # Of a normalisation.


def peers(layer: Layer, layers: Sequence[Layer]) -> float:
    """Median gain of the other layers; nan if there are fewer than two."""
    others = [x.gain for x in layers if x is not layer and x.gain > 0]
    return float(np.median(others)) if len(others) >= 2 else math.nan


def queries_and_keys(facts: Facts) -> set[str]:
    return {
        name for layer in facts.layers for name in layer.parents if layer.logit >= 0
    }


def weights_large(facts: Facts) -> Iterator[Verdict]:
    weighted, asked = facts.weighted, queries_and_keys(facts)
    embeddings = {x.leaf for x in facts.layers if x.kind == "embed"}
    for layer in weighted:
        if layer.normalised or layer.name in asked:
            continue
        # A head that shares an embedding may have its inputs divided by its gain.
        if layer.leaf in embeddings and layer.rms < LARGE:
            continue
        if not math.isfinite(layer.gain):
            continue
        usual, ratio = peers(layer, weighted), layer.gain / layer.right_gain
        alone = math.isnan(usual)
        if ratio < (4.0 if alone else LARGE):
            continue
        if not alone and layer.gain < LARGE_AGAINST_PEERS * usual:
            continue
        yield _verdict("weights_large", layer, usual, "large", ratio >= CRITICAL)


def weights_small(facts: Facts) -> Iterator[Verdict]:
    weighted, asked = facts.weighted, queries_and_keys(facts)
    for layer in weighted:
        exempt = layer.normalised or layer.beside_stream or layer.name in asked
        if exempt or facts.is_head(layer):
            continue
        if layer.gain == 0:
            if not layer.joined:
                yield _zero(layer)
            continue
        usual = peers(layer, weighted)
        low = layer.gain < layer.right_gain / SMALL
        if low and layer.gain < usual / SMALL_AGAINST_PEERS:
            yield _verdict("weights_small", layer, usual, "small", False)


def _zero(layer: Layer) -> Verdict:
    std = layer.right_gain / math.sqrt(layer.fan_in)
    return Verdict(
        rule="weights_small",
        severity="critical",
        layer=layer.name,
        finding=f"All weights of {layer.name} are 0: no example and no gradient passes "
        "it.",
        evidence={"gain": 0.0, "right_gain": layer.right_gain},
        threshold="a gain above 0, but in the last layer of a network or of a branch",
        source="He et al. (2015), https://arxiv.org/abs/1502.01852; gain by quadrature",
        remedy=f"Initialise {layer.leaf} with a standard deviation of {std:.3g}.",
        formula=f"std = gain / sqrt(fan_in) = {layer.right_gain:.3g} / "
        f"sqrt({layer.fan_in})",
        code=f"kernel_init=jax.nn.initializers.normal({std:.3g})",
        change={"initialise": {layer.leaf: std}},
    )


def _verdict(rule, layer: Layer, usual: float, word: str, critical: bool) -> Verdict:
    target = layer.right_gain if math.isnan(usual) else min(layer.right_gain, 2 * usual)
    factor = target / layer.gain
    std = target / math.sqrt(layer.fan_in)
    limits = {
        "large": f"{LARGE:g} times the right gain and {LARGE_AGAINST_PEERS:g} times "
        "the median layer's",
        "small": f"1/{SMALL:g} of the right gain and of the median layer's",
    }
    act = f" before {layer.activation}" if layer.activation else ""
    return Verdict(
        rule=rule,
        severity="critical" if critical else "warning",
        layer=layer.name,
        finding=f"The weights of {layer.name} are too {word}: they multiply the RMS by "
        f"{layer.gain:.3g}, where {layer.right_gain:.3g} keeps it{act}.",
        evidence={
            "gain": layer.gain,
            "right_gain": layer.right_gain,
            "median_gain_of_others": usual,
            "input_rms": layer.input_rms,
            "rms": layer.rms,
        },
        threshold=limits[word],
        source="He et al. (2015), https://arxiv.org/abs/1502.01852; gain by quadrature",
        remedy=f"Initialise {layer.leaf} with a standard deviation of {std:.3g}; in "
        f"place, multiply it by {factor:.3g}.",
        formula=f"std = gain / sqrt(fan_in) = {target:.3g} / sqrt({layer.fan_in})",
        code=f"kernel_init=jax.nn.initializers.normal({std:.3g})",
        change={"multiply": {layer.leaf: factor}},
    )


def norm_scale(facts: Facts) -> Iterator[Verdict]:
    norms = [x for x in facts.layers if x.kind == "norm" and x.weight_rms > 0]
    median = float(np.median([x.weight_rms for x in norms])) if norms else 1.0
    usual = max(median, 0.25) if len(norms) > 2 else 1.0
    for layer in norms:
        if layer.weight_rms > SCALE * usual and layer.weight_rms > SCALE:
            factor = usual / layer.weight_rms
            yield Verdict(
                rule="norm_scale",
                severity="critical" if layer.weight_rms > 2 * SCALE else "warning",
                layer=layer.name,
                finding=f"The normalisation {layer.name} multiplies by "
                f"{layer.weight_rms:.3g}; the others by {usual:.3g}.",
                evidence={"scale": layer.weight_rms, "median_of_others": usual},
                threshold=f"{SCALE:g}, and {SCALE:g} times the median",
                source="definition: a normalisation starts at scale 1",
                remedy=f"Set its scale to {usual:.3g}; in place, multiply it by "
                f"{factor:.3g}.",
                formula="y = scale (x - mean) / sqrt(var + e) + shift, scale = 1",
                code="scale_init=jax.nn.initializers.ones",
                change={"multiply": {layer.leaf: factor}},
            )


_SYMPTOMS = (
    "no_gradient",
    "saturated",
    "dead_units",
    "exploding",
    "vanishing",
    "residual",
    "attention",
    "router",
    "rank_collapse",
    "overflow16",
    "rate",
    "epsilon",
    "stale_moment",
    "updates",
    "odd_shard",
)
RULES = (
    Rule(
        "weights_large",
        "Are single layers' weights too large?",
        weights_large,
        _SYMPTOMS,
    ),
    Rule(
        "weights_small",
        "Are single layers' weights too small?",
        weights_small,
        _SYMPTOMS,
    ),
    Rule("norm_scale", "Does a normalisation amplify?", norm_scale, _SYMPTOMS),
)
