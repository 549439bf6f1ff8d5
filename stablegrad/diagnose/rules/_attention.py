"""Attention and routers that look at one thing only."""

import math
from collections.abc import Iterator

from ._rule import Facts, Rule, Verdict
from ._weights import peers

ENTROPY, LOGIT, CRITICAL_LOGIT = 0.35, 30.0, 1000.0
ENTROPY_OF_ODD, PEERS = 0.5, 4.0  # Where queries or keys outweigh other layers.
ROUTER_ENTROPY = 0.6


def attention(facts: Facts) -> Iterator[Verdict]:
    for layer in facts.layers:
        if layer.kind != "attention":
            continue
        sharp = layer.entropy < ENTROPY and layer.logit > LOGIT
        sources = [facts.layer(name) for name in layer.parents]
        odd = any(x.gain > PEERS * peers(x, facts.weighted) for x in sources)
        odd &= layer.entropy < ENTROPY_OF_ODD
        if not (sharp or odd or layer.logit > CRITICAL_LOGIT):
            continue
        factor = math.sqrt(min(1.0, 8.0 / layer.logit))
        leaves = {
            facts.layer(name).leaf: (
                factor**2 if len(set(layer.parents)) == 1 else factor
            )
            for name in layer.parents
        }
        yield Verdict(
            rule="attention",
            severity="critical" if layer.logit > CRITICAL_LOGIT else "warning",
            layer=layer.name,
            finding=f"Attention in {layer.name} is almost a choice of one key: logits "
            f"reach {layer.logit:.3g}, the entropy is {layer.entropy:.0%} of that of "
            "equal weights.",
            evidence={"logit": layer.logit, "entropy": layer.entropy},
            threshold=f"entropy below {ENTROPY:.0%} at logits above {LOGIT:g}, below "
            f"{ENTROPY_OF_ODD:.0%} at {PEERS:g} times the gain of other layers, or "
            f"logits above {CRITICAL_LOGIT:g}",
            source="Zhai et al. (2023), https://arxiv.org/abs/2303.06296; Wortsman et "
            "al. (2023), https://arxiv.org/abs/2309.14322",
            remedy="Normalise queries and keys; or multiply the weights of both by "
            f"{factor:.3g} (QK-clip).",
            formula="logits = q.k / sqrt(d), with q / rms(q) and k / rms(k)",
            code="nnx.MultiHeadAttention(..., normalize_qk=True)",
            change={"multiply": leaves},
        )


def router(facts: Facts) -> Iterator[Verdict]:
    for layer in facts.layers:
        if layer.kind != "router" or not layer.entropy < ROUTER_ENTROPY:
            continue
        parent = facts.layer(layer.parents[0])
        yield Verdict(
            rule="router",
            severity="warning",
            layer=parent.name,
            finding=f"The router {parent.name} sends almost everything one way: the "
            f"busiest expert gets {layer.busiest:.3g} times an equal share, the mean "
            f"load has {layer.entropy:.0%} of the entropy of equal loads.",
            evidence={"busiest": layer.busiest, "entropy": layer.entropy},
            threshold=f"{ROUTER_ENTROPY:.0%} of the entropy of equal loads",
            source="Fedus et al., Switch Transformer (2022), "
            "https://arxiv.org/abs/2101.03961",
            remedy="Start the router near zero without a bias, and add a loss that "
            "balances the load.",
            formula="loss + 0.01 E sum_e load_e mean_weight_e",
            code="kernel_init=jax.nn.initializers.normal(1e-2), bias = 0",
            change={
                "multiply": {parent.leaf: min(1.0, 1 / max(parent.gain, 1e-30))},
                "zero_bias": parent.leaf,
            },
        )


RULES = (
    Rule(
        "attention",
        "Does attention look at more than one key?",
        attention,
        ("vanishing", "exploding", "rate", "rank_collapse", "updates"),
        forward=True,
    ),
    Rule("router", "Do all experts get work?", router, ("rate",), forward=True),
)
