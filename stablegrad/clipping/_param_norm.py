"""Clip by a share of each unit's parameters: AGC, robust and as published."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._checks import require
from ..granularity import _units
from ..granularity._groups import Units, units
from ..thresholds._base import Scope
from ..thresholds._param_ratio import param_ratio
from ._base import NormClip, NormStep, clip_norms, clip_to_threshold


def clip_by_param_norm(
    ratio: float | jax.Array = 0.01,
    *,
    eps: float | jax.Array | None = None,
    axis: _units.AxisRule = None,
    stacked: _units.StackRule = None,
    exclude: str | Callable[[Any, Any], bool] | None = None,
    published: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Shrink each unit's gradient to a share of that unit's parameters: AGC.

        g_u <- g_u * min(1, ratio * max(||w_u||, eps) / ||g_u||)

    Args:
        ratio: Tolerated share of the parameters' norm, > 0. The paper's 0.01 is for
            batches of 1024 and more; small batches need up to 0.16.
        eps: Lower bound on the norm of a unit's parameters, > 0, or >= 0 if published.
            None: 1, the usual norm at initialisation; 1e-3 if published, with which
            layers of zeros hardly move.
        axis: The axes of a unit, as for `units`. None: inferred; if published, as in
            the paper: the first for two or three axes, the first three for four.
        stacked: The leaves with a leading layer axis, as for `units`.
        exclude: The leaves that are not clipped, as for `units`; in the paper the
            classifier, for example "head".
        published: Whether to follow the recurrence of the paper exactly.

    Returns:
        A transformation for `optax.chain`, which needs `params` at every step. A
        gradient with a nan or inf, or of norm 1e18 or more, becomes zeros; if
        published, it passes.

    Raises:
        ValueError: If a concrete argument is out of range; when initialised, if the
            layout of a leaf is unknown; at a step without `params`.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> clip = sg.clip_by_param_norm(0.02, exclude="head")
        >>> tx = optax.chain(clip, optax.sgd(0.1))

    Reference:
        Brock et al. (2021), https://arxiv.org/abs/2102.06171.
    """
    if published and axis is None and stacked is None:
        axis = _published_axes
    per = units(axis, stacked, exclude)
    if published:
        clip = _published(ratio, 1e-3 if eps is None else eps, per)
    else:
        threshold = param_ratio(ratio, eps=1.0 if eps is None else eps, per=per)
        clip = clip_to_threshold(threshold)
    return clip_norms("clip_by_param_norm", clip)


def _published_axes(path, leaf) -> tuple[int, ...]:
    """Return the axes of a unit by the paper's code, and by optax's for five axes."""
    del path
    rank = np.ndim(leaf)
    if sum(size > 1 for size in np.shape(leaf)) <= 1:
        return tuple(range(rank))
    return (0,) if rank <= 3 else tuple(range(rank - 1))


def _published(ratio, eps, per: Units) -> NormClip:
    require("ratio", ratio, "> 0", lambda x: 0 < x < float("inf"))
    require("eps", eps, ">= 0", lambda x: 0 <= x < float("inf"))

    def step(statistics, norms, scope: Scope) -> NormStep:
        limit = ratio * jnp.maximum(scope.param_norms, eps)
        shrunk = limit / jnp.maximum(norms, 1e-6)
        return NormStep(jnp.where(norms > limit, shrunk, 1.0), limit, statistics)

    return NormClip(per, lambda groups: (), step, of_params=True, published=True)
