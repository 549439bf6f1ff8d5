"""Trust region: hold the length of every step to a radius that probes set."""

import warnings
from typing import Literal

import jax.numpy as jnp
from jax import lax

from ..._checks import require, require_steps
from .._base import ProbeResult, Response
from ._probe import KINDS, Attempt, look
from ._radius import (
    ACCEPT,
    DENSE,
    TrustRegionState,
    after_probe,
    after_step,
    before_step,
    init_radius,
    is_due,
    longest_rise,
    readings,
)


def trust_region(
    every: int = 4,
    high: float | None = None,
    low: float | None = None,
    *,
    grow: float | None = None,
    probe: Literal["forward", "hvp"] = "forward",
) -> Response:
    """Hold the length of every step to a radius, moved by probes of the loss along it.

    For the step d that the optimizer wants, with s = g . d the change of the loss that
    the gradient promises, a probe on the same batch measures

        r = 1 + (L(theta + d) - L(theta)) / |s|

    0: as promised; 1/2: at the minimum of the line; 1: nothing gained. With numerator
    and denominator averaged over probes, every step, also between probes, is held to a
    radius R, and each probe moves R and the r that it aims at:

        |step_t| = min(|d_t|, R)
        target  <- clip(target + 0.03 balance, 0.2, 2),  1/2 at first
        log R   <- log R + 0.3 clip(target - r, -1, 1),  rises times (1 + balance) / 2,
                   falls from 2 |d_t| at most
        balance  = (D - 0.05 G) / (|D| + 0.05 G + error)

    D is the fall of the loss in a step, over the last eighth of the run, `error` its
    deviation by noise, and G the mean fall that a step causes on its own batch. While
    the loss falls, the target rises above the r of healthy steps, and a cut is soon
    forgotten. Where less than a twentieth of what steps gain on their own batch is
    real, steps are too long for the noise, and the target sinks, to 0.2 at least: on a
    plateau, steps of a small r are left alone. A jump of the loss, as after a change of
    the data, counts neither way.

    The first five steps are probed, then every `every`-th, and half as often while R
    does not bind. A step that would double the loss, or make it nan or inf, is
    shortened before it is taken, as is a first step of r above 1/2. A step four times
    as long as the last one is a first step again. The schedule's rate is never
    exceeded.

    Pass the loss and a function of the parameters that repeats it, on the same batch
    and with the same random numbers, averaged over devices if the gradients are:

        tx.update(grads, state, params, value=loss,
                  value_fn=lambda params: loss_fn(params, batch))

    Gradients must be those of `value`, neither scaled nor summed. The first probes
    detect gradients more than 1.5 times too large, and, where they find a step harmful,
    a `value_fn` that does not repeat the loss: most of the rise is at the parameters
    themselves, too. The first step also tells gradient ascent, which raises the loss as
    its gradient promises. `trust_mismatch` is then set, and the trust region is
    switched off for the rest of the run. To maximise, pass the negative as the loss,
    with its own gradient.

    Args:
        every: Steps between probes, >= 1: each costs one forward pass.
        high: Has no effect; deprecated, as are `low` and `grow`.
        low: Has no effect.
        grow: Has no effect.
        probe: "forward", one forward pass along the whole step; or "hvp", one `jvp` of
            a `jvp`, about two passes: the curvature at the parameters alone, but free
            of rounding where a step changes the loss by less than 1e-6 of it.

    Returns:
        A response for `guard`. `metrics` have `trust_radius` (in the units of the
        parameters, inf while it does not bind), `trust_ratio` (r), `trust_scale` (on
        the last step), `trust_probes`, `trust_cuts` (steps shortened at once),
        `trust_target` and `trust_mismatch`. A gradient or loss that is not finite
        teaches nothing.

    Raises:
        ValueError: If a concrete argument is out of range; when a step is traced, if
            `value=`, `value_fn=` or `params` is missing.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> loss_fn = lambda params: jnp.sum(params**2)
        >>> tx = sg.guard(optax.sgd(100.0), sg.trust_region())
        >>> params = jnp.array([3.0, 4.0])
        >>> loss, grads = jax.value_and_grad(loss_fn)(params)
        >>> state = tx.init(params)
        >>> extra = {"value": loss, "value_fn": loss_fn}
        >>> params, state = sg.apply(tx, grads, state, params, **extra)
        >>> bool(loss_fn(params) < loss)
        True

    Reference:
        Conn, Gould and Toint, Trust-region methods (2000). 1 / r is the critical
        learning rate of Kalra et al. (2026), https://arxiv.org/abs/2601.16979.
    """
    for name, given in (("high", high), ("low", low), ("grow", grow)):
        if given is not None:
            warnings.warn(
                f"`{name}` of `trust_region` has no effect any more: the law has no "
                "bounds to set. It will be removed in 0.3.0.",
                DeprecationWarning,
                stacklevel=2,
            )
    return _trust_region(every, probe, required=True)


def optional_trust_region() -> Response:
    """Return the default trust region, which is off while no `value_fn=` is passed."""
    return _trust_region(4, "forward", required=False)


def _trust_region(every, probe, required) -> Response:
    require_steps("every", every)
    require("probe", probe, f"one of {KINDS}", lambda x: x in KINDS)

    def look_ahead(state: TrustRegionState, attempt: Attempt) -> ProbeResult:
        length = attempt.length
        sound = (length > 0) & jnp.isfinite(length)
        state = before_step(state, length)
        held = jnp.minimum(1.0, state.trust_radius / jnp.where(sound, length, 1.0))
        held = jnp.where(sound, held, 1.0).astype(jnp.float32)
        # A step whose length overflows is longer than any radius.
        overflows = ~jnp.isfinite(length)
        held = jnp.where(overflows, 0.0, held)

        def probed(state):
            first = state.probes_known == 0
            rise = longest_rise(state, attempt.loss)
            limit = jnp.where(first, ACCEPT, jnp.inf)
            found = look(
                attempt,
                probe,
                held,
                rise,
                accept=limit,
                aim=ACCEPT / 2,
                is_early=state.steps_tried < DENSE,
                is_first=state.steps_tried == 0,
            )
            after, alarm = after_probe(state, found, held * length, length, every)
            part = jnp.where(found.accepted, found.part, 0.0)
            part = jnp.where(found.mismatch, 1.0, part)
            return after, alarm, held * part

        def unprobed(state):
            return state, overflows, held

        due = is_due(state, every) & sound & jnp.isfinite(attempt.loss)
        after, alarm, scale = lax.cond(due, probed, unprobed, state)
        after = after_step(after, attempt.loss, length, scale, sound)
        return ProbeResult(scale, alarm, after)

    return Response(
        "trust_region",
        (),
        init_radius,
        look_ahead=look_ahead,
        needs_value_fn=required,
        readings=readings,
    )
