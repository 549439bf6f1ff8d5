"""StableAdamW as published: `clip_update_rms(published=True)`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _trees
from ..._norms import measure
from ..._scales import Scales, scale_leaves, scaled_norm
from .. import _elements, _moments
from .._base import transformation
from .._readings import ClipNumbers, ClipRecord


class StableAdamWState(NamedTuple):
    """State of StableAdamW."""

    clip_inner: Any  # State of the inner optimizer.
    clip_moment: Any  # float32: the second moment, shaped like the parameters.
    clip_numbers: ClipNumbers  # Readings and statistics.


class StableAdamWStatistics(NamedTuple):
    """Statistics of StableAdamW."""

    moment_steps: jax.Array  # int32: steps in the moment.


def stable_adamw(
    name: str, optimizer, max_rms, decay, eps
) -> optax.GradientTransformationExtraArgs:
    """Return StableAdamW; arguments as for `clip_update_rms`.

    Reference:
        Wortsman et al., Stable and low-precision training for large-scale
        vision-language models (2023), https://arxiv.org/abs/2304.13013.
    """
    record = ClipRecord(
        name, lambda tree: StableAdamWStatistics(jnp.zeros((), jnp.int32))
    )

    def init_fn(params) -> StableAdamWState:
        inner, moment = _moments.init(name, optimizer, True, params)
        return StableAdamWState(inner, moment, record.init(params))

    def update_fn(updates, state, params=None, **extra):
        before = record.statistics(state.clip_numbers, updates)
        steps = _trees.increment(before.moment_steps)
        moment = _moments.track(state.clip_moment, updates, decay)
        correction = _moments.correction(decay, steps)
        least = jnp.asarray(eps, jnp.float32) ** 2

        def squares(g, v):
            return _elements.squares(g) / jnp.maximum(correction * v, least)

        ratios = _trees.map_inexact(squares, updates, updates, moment)
        rms = jnp.sqrt(_moments.means(ratios, updates))
        scales = Scales(1 / jnp.maximum(rms / max_rms, 1.0))
        out, inner = optimizer.update(updates, state.clip_inner, params, **extra)
        measured = measure(out, updates)
        finite = measured.finite
        length = scaled_norm(measured, scales, out, updates)
        numbers = record.after_step(
            state.clip_numbers,
            updates,
            StableAdamWStatistics(steps),
            raw=measured.norm,
            clipped=jnp.where(finite, length, 0.0),
            limit=max_rms,
            scale=scales.smallest(),
            finite=finite,
        )
        out = scale_leaves(out, scales, updates)
        return out, StableAdamWState(inner, moment, numbers)

    return transformation(name, StableAdamWState, init_fn, update_fn)
