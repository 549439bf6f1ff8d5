"""Adaptive gradient clipping as published: `clip_by_param_norm(published=True)`."""

import jax.numpy as jnp

from ..._checks import require
from ...granularity._groups import Granularity
from ...thresholds._base import Scope
from .._base import NormClip, NormStep


def agc(ratio, eps, per: Granularity) -> NormClip:
    """Return adaptive gradient clipping; arguments as for `clip_by_param_norm`."""
    require("ratio", ratio, "> 0", lambda x: 0 < x < float("inf"))
    require("eps", eps, ">= 0", lambda x: 0 <= x < float("inf"))

    def step(statistics, norms, scope: Scope) -> NormStep:
        limit = ratio * jnp.maximum(scope.param_norms, eps)
        shrunk = limit / jnp.maximum(norms, 1e-6)
        return NormStep(jnp.where(norms > limit, shrunk, 1.0), limit, statistics)

    return NormClip(per, lambda groups: (), step, of_params=True, published=True)
