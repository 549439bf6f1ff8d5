"""Weight decay that follows the schedule of the learning rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._checks import require
from .._missing import missing_params
from .._trees import increment


class ScheduledDecayState(NamedTuple):
    decay_steps: jax.Array  # int32, (): steps so far, saturating.


def decay_with_schedule(
    weight_decay: float,
    schedule: optax.Schedule,
    peak: float,
    *,
    mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Add weight decay that falls with the learning rate: AdamC.

        u_t <- u_t + weight_decay (rate_t / peak) theta_t

    Place it before the learning rate in the chain. If a normalisation follows a kernel,
    the norm of the kernel's gradient settles at sqrt(2 decay_t / rate_t) times the norm
    of the kernel. With a constant decay, this ratio grows as the rate falls to 0, and
    the kernel's norm shrinks. With the scheduled decay, the ratio keeps its value at
    the peak.

    Args:
        weight_decay: The decay at the peak, >= 0.
        schedule: The learning rate by step, as the chain's own.
        peak: Its largest value, > 0.
        mask: As for `optax.add_decayed_weights`: True for the leaves that decay. In the
            paper, these are the layers in front of a normalisation, and all others use
            `optax.add_decayed_weights(weight_decay)`.

    Returns:
        A transformation for `optax.chain`. It needs `params`; updates keep their
        dtypes, and what is not finite passes through.

    Raises:
        ValueError: If a concrete number is out of range, or `schedule` is a number.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> rate = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 100, 1000)
        >>> tx = optax.chain(
        ...     optax.scale_by_adam(),
        ...     sg.structure.decay_with_schedule(0.1, rate, peak=3e-4),
        ...     optax.scale_by_learning_rate(rate),
        ... )

    Reference:
        Defazio (2025), https://arxiv.org/abs/2506.02285.
    """
    finite = lambda x: 0 <= x < float("inf")
    require("weight_decay", weight_decay, "finite and >= 0", finite)
    require("schedule", schedule, "a function of the step", callable)
    require("peak", peak, "> 0", lambda x: 0 < x < float("inf"))

    def init_fn(params) -> ScheduledDecayState:
        del params
        return ScheduledDecayState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state: Any, params: Any = None):
        if params is None:
            raise missing_params("`decay_with_schedule`")
        rate = jnp.asarray(schedule(state.decay_steps))
        factor = weight_decay * rate / peak

        def decayed(update, param):
            if update is None:
                return None
            narrow = np.promote_types(jnp.result_type(param), update.dtype)
            wide = np.promote_types(narrow, np.float32)
            decay = factor.astype(wide) * jnp.asarray(param, wide)
            return (jnp.asarray(update, wide) + decay).astype(update.dtype)

        none = lambda x: x is None
        updates = jax.tree.map(decayed, updates, params, is_leaf=none)
        return updates, ScheduledDecayState(increment(state.decay_steps))

    transformation = optax.GradientTransformation(init_fn, update_fn)
    return transformation if mask is None else optax.masked(transformation, mask)
