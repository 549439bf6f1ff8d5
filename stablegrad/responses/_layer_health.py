"""Layer health: record how the layers fare, and warn early; change nothing."""

import jax

from .._checks import require, require_count
from ..granularity._groups import Granularity, Units
from ..thresholds._rarity import rarity
from ._base import Response
from ._layers import LayerHealth


def layer_health(
    per: Granularity = "leaf",
    *,
    every: int = 16,
    share: float | jax.Array = 0.01,
    window: int | jax.Array = 1024,
    margin: float | jax.Array = 1.5,
    cosine: bool = False,
) -> Response:
    """Record update ratios and gradient norms by layer, and warn before spikes.

        update_ratio   ||u|| / ||theta||       of the step as it is taken
        grad_norm      ||g||                   of the incoming gradient
        cosine         g_t . g_{t-1} / (||g_t|| ||g_{t-1}||)    if asked for

    for each group, every `every` steps. Update ratios have limits by `rarity`. A check
    in which two groups are above their limits, or one is above twice its own, is a
    warning: an event of the kind "warn" that names the worst leaf, and one of
    `warned_steps`. It changes nothing.

    Args:
        per: What is measured by itself: "leaf", "global", or a function
            `(path, leaf) -> label`, such as the name of a block.
        every: Steps taken from one check to the next, >= 1. A check evaluates the
            update once more; the other steps cost nothing but a condition.
        share: As for `rarity`, of the checks.
        window: As for `rarity`, in checks.
        margin: Factor on the limits, >= 1: about how far beyond the rarest usual ratio
            a warning begins.
        cosine: Whether to record the cosine of successive gradients, which falls
            towards -1 where the steps overshoot. It keeps one more gradient in memory.

    Returns:
        A response for `guard`. `metrics` shows `layer_health_update_ratio/<leaf>`,
        `layer_health_grad_norm/<leaf>` and, if measured, `layer_health_cosine/<leaf>`
        of the last check; `layer_health_checks`; and `layer_health_excess`, the octaves
        by which the ratios exceed the level of a warning. A rejected step is not
        checked, nor is a ratio that is not finite or zero.

    Raises:
        ValueError: If a concrete argument is out of range, `per` is units, or a step
            comes without `params`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.layer_health(every=1))
        >>> params = {"a": jnp.full(4, 2.0), "b": jnp.ones(1)}
        >>> grads = {"a": jnp.ones(4), "b": jnp.ones(1)}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> now = sg.metrics(state)
        >>> round(float(now["layer_health_update_ratio/a"]), 3)
        0.05
    """
    if isinstance(per, Units) or per == "unit":
        raise ValueError('`layer_health` measures layers: `per` must not be "unit".')
    require_count("every", every)
    require("margin", margin, ">= 1", lambda x: 1 <= x < float("inf"))
    rarity(share, window=window, margin=margin, per=per)  # Checks the others.
    settings = LayerHealth(per, every, share, window, margin, cosine)
    return Response("layer_health", (), layers=settings)
