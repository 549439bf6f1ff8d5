"""Clip by a share of each unit's parameters: adaptive gradient clipping."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import require
from ..granularity import _units
from ..granularity._groups import units
from ..thresholds._base import Scope
from ..thresholds._param_ratio import param_ratio
from ._base import Rule, Ruling, by_threshold, clipping


def clip_by_param_norm(
    ratio: float | jax.Array = 0.01,
    *,
    eps: float | jax.Array | None = None,
    axis: _units.AxisRule = None,
    stacked: _units.StackRule = None,
    exclude: str | Callable[[Any, Any], bool] | None = None,
    published: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks each unit's gradient to a share of that unit's parameters: AGC.

        g_u <- g_u * min(1, ratio * max(||w_u||, eps) / ||g_u||)

    Published: eps = 1e-3, so that layers which start at zero hardly move under SGD.
    Default: eps = 1, the norm that a unit has under the usual initialisations.

    Args:
        ratio: Tolerated share of the parameters' norm, > 0. The paper's 0.01 is for
            batches of 1024 and more; small batches want up to 0.16.
        eps: What a unit's norm counts as at least, > 0. None: 1; as published 1e-3.
        axis: The axes that one unit spans, as for `units`.
        stacked: Which leaves have a leading layer axis, as for `units`.
        exclude: Which leaves are left alone, as for `units`. The paper leaves out the
            classifier: exclude="head", say.
        published: Whether to follow the paper's recurrence exactly.

    Returns:
        A transformation for `optax.chain`, which needs `params` at every step. A step
        with a nan or inf anywhere becomes all zeros, and is counted; as published it
        passes.

    Raises:
        ValueError: If a concrete argument is out of range; when initialised, if a
            layout is unknown; at a step without `params`.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(
        ...     sg.clip_by_param_norm(0.02, exclude="head"),
        ...     optax.sgd(0.1, momentum=0.9, nesterov=True),
        ... )

    Reference:
        Brock et al., High-performance large-scale image recognition without
        normalization (2021), https://arxiv.org/abs/2102.06171.
    """
    per = units(axis, stacked, exclude)
    if not published:
        threshold = param_ratio(ratio, eps=1.0 if eps is None else eps, per=per)
        return clipping("clip_by_param_norm", by_threshold(threshold))
    floor = 1e-3 if eps is None else eps
    require("ratio", ratio, "> 0", lambda x: 0 < x < float("inf"))
    require("eps", floor, ">= 0", lambda x: 0 <= x < float("inf"))

    def follow(state, norms, scope: Scope) -> Ruling:
        limit = ratio * jnp.maximum(scope.param_norms, floor)
        shrunk = limit / jnp.maximum(norms, 1e-6)
        return Ruling(jnp.where(norms > limit, shrunk, 1.0), limit, state)

    return clipping(
        "clip_by_param_norm",
        Rule(per, lambda groups: (), follow, of_params=True, published=True),
    )
