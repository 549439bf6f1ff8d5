"""The guard: measures a step once, asks every response, multiplies and selects once.

    gradient -> measure -> judge -> propose -> [hold | inner optimizer -> measure
             -> judge -> propose -> hold or commit] -> learn -> settle -> record

Everything in brackets runs under one `lax.cond`: a step that is rejected for its
gradient or loss never reaches the inner optimizer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from . import _checks, _judging, _looking, _record, _trees
from ._groups import group
from ._measure import Measurement, measure, newly_nonfinite, scaled_norm, unmeasured
from ._reasons import Reason, first_reason
from .responses._core import Foresight, Response, Verdict


class GuardState(NamedTuple):
    """State of `guard`."""

    guarded_inner: Any  # State of the inner transformation.
    threshold_states: tuple  # For each response, one state a threshold.
    response_states: tuple  # For each response, its own state.
    record: _record.Record  # What `metrics` and `events` read.
    layout: dict[str, None]  # Names of the leaves given to `init`; no arrays.


class GuardedTransformation(optax.GradientTransformationExtraArgs):
    """A guard's `init` and `update`, and the fused step that `apply` takes."""

    fused_step: Callable[..., tuple[Any, GuardState]]


class _Taken(NamedTuple):
    """What the bracketed part of a step gave."""

    ahead: Foresight  # Of all responses that look along the step.

    result: Any  # Updates or parameters, whichever the caller asked for.
    inner_state: Any
    update: Measurement  # Of the inner transformation's own update.
    applied_norm: jax.Array  # The norm of what the caller gets to add.
    words: _judging.Words  # What every threshold said in the end.
    verdict: Verdict  # A reason of 0 if the step was taken.


def guard(
    inner: optax.GradientTransformation, *responses: Response
) -> GuardedTransformation:
    """Runs an optimizer so that no single step can harm it, and says what it did.

    With g the gradient, S the inner state, and s, s', k the factors that `clip` (of the
    gradient, of the update) and `back_off` ask for:

        u_t, S_t = inner(s_t g_t, S_{t-1});    step_t = k_t s'_t u_t
        if any response rejects the step:      step_t = 0, S_t = S_{t-1}

    Whatever the responses, a step is rejected if its update is not finite, or if
    anything in the inner state or the parameters that was finite before no longer is.
    Thresholds judge by the past alone, see the raw signals, and learn from every finite
    one, also on rejected steps; a norm of exactly zero teaches nothing.

    Args:
        inner: The optimizer, any optax transformation; extra arguments reach it.
        *responses: What to do about which steps: `clip`, `skip`, `back_off`, `halt`.

    Returns:
        A transformation for `update`, or for `stablegrad.apply`. It keeps structure,
        shapes and dtypes, passes over leaves that are not floating point, and holds its
        own numbers in float32 and int32. A rejected step's updates are zeros.

    Raises:
        TypeError: If `inner` is not an optax transformation, or a later argument is not
            a response.
        ValueError: When a step is traced, if `value=` or `params` is needed and
            missing, or if the pytree has other leaves than the one given to `init`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.clip(sg.fixed(1.0)), sg.skip())
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.array([jnp.nan, 1.0])}, state, params)
        >>> updates["w"].tolist(), int(sg.metrics(state)["skipped_steps"])
        ([0.0, 0.0], 1)
    """
    _checks.require_optimizer("guard", inner)
    for response in responses:
        if not isinstance(response, Response):
            raise TypeError(
                "`guard` takes responses, such as `clip(zscore(2.5))` or `skip()`, one "
                f"by one; got {_checks.described(response)}."
            )
    transformation = optax.with_extra_args_support(inner)
    limit_names = _judging.limit_names(responses)

    def init_fn(params) -> Any:
        names = _trees.leaf_names(params)
        watched = tuple(
            tuple(t.init(group(t.per, params).count) for t in r.thresholds)
            for r in responses
        )
        answers = tuple(response.init() for response in responses)
        record = _record.init_record(limit_names)
        return GuardState(
            _trees.strongly_typed(transformation.init(params)),
            *_trees.distinct((watched, answers, record)),
            layout=_trees.layout(names),
        )

    def run(updates, state: GuardState, params, extra, commit, held) -> Any:
        """One step: `commit(update, params)` if taken, `held(params)` if not."""
        _checks.same_leaves(_trees.names_in(state.layout), _trees.leaf_names(updates))
        gradient = measure(updates)
        states = state.threshold_states
        scopes = _judging.scopes_of(responses, updates, params)
        incoming = _judging.judge_incoming(
            responses, states, scopes, gradient, updates, params, extra
        )
        before = _judging.verdict_on(responses, state.response_states, incoming)

        def take(updates, inner_state, params) -> _Taken:
            clipped = _trees.scale_leaves(updates, before.gradient_scale, updates)
            update, new_inner = transformation.update(
                clipped, inner_state, params, **extra
            )
            _checks.same_state(inner_state, new_inner)
            measured = measure(update, like=updates)
            words = _judging.judge_outgoing(
                responses,
                states,
                scopes,
                incoming,
                measured,
                _trees.inexact_leaves(update, updates),
            )
            after = _judging.verdict_on(responses, state.response_states, words)
            broken = newly_nonfinite(new_inner, inner_state)
            reason = first_reason(
                (
                    after.reason,
                    jnp.where(measured.finite, 0, int(Reason.NONFINITE_UPDATE)),
                    jnp.where(broken, int(Reason.NONFINITE_STATE), 0),
                )
            )
            scales = _trees.times(after.update_scale, after.lr_scale)
            length = scaled_norm(measured, scales, update, updates)
            ahead = _looking.look_ahead(
                responses,
                state.response_states,
                updates,
                _trees.scale_leaves(update, scales, updates),
                length,
                params,
                extra,
            )
            scales = _trees.times(scales, ahead.step_scale)
            step = _trees.scale_leaves(update, scales, updates)
            if params is not None:
                # Scaling, adding, or the parameters' dtype may still overflow.
                spoilt = newly_nonfinite(optax.apply_updates(params, step), params)
                last = jnp.where(spoilt, int(Reason.NONFINITE_PARAMETERS), 0)
                reason = first_reason((reason, last))
            fine = reason == 0
            return _Taken(
                ahead,
                _trees.select(fine, commit(step, params), held(params)),
                _trees.select(fine, new_inner, inner_state),
                measured,
                length * ahead.step_scale,
                words,
                after._replace(reason=reason),
            )

        def hold(updates, inner_state, params) -> _Taken:
            del updates
            nothing = unmeasured(gradient.leaf_norms.shape[0])
            return _Taken(
                _looking.unlooked(state.response_states),
                held(params),
                inner_state,
                nothing,
                nothing.norm,
                incoming,
                before,
            )

        reached = before.reason == 0
        taken = lax.cond(reached, take, hold, updates, state.guarded_inner, params)
        words = taken.words
        reason = taken.verdict.reason
        settled = tuple(
            response.settle(response_state, own, reason)
            for response, response_state, own in zip(
                responses, taken.ahead.state, words, strict=True
            )
        )
        halted = [r.halts(s) for r, s in zip(responses, settled, strict=True)]
        limits = (judgement.limit for own in words for judgement in own)
        record = _record.update_record(
            state.record,
            gradient,
            taken.update,
            taken.verdict,
            clipped_norm=scaled_norm(gradient, taken.verdict.gradient_scale, updates),
            applied_norm=taken.applied_norm,
            limits=dict(zip(limit_names, limits, strict=True)),
            loss=_judging.loss_of(extra),
            ahead=taken.ahead,
            halted=jnp.any(jnp.stack(halted)) if halted else jnp.zeros((), bool),
        )
        learned = _judging.learned(responses, states, words)
        return taken.result, GuardState(
            taken.inner_state, learned, settled, record, state.layout
        )

    def update_fn(updates, state, params=None, **extra):
        try:
            structs, _ = jax.eval_shape(
                lambda *args: transformation.update(*args, **extra),
                updates,
                state.guarded_inner,
                params,
            )
        except ValueError as error:
            if params is None and "params" in str(error):
                raise _checks.missing_params("the guarded optimizer") from error
            raise
        return run(
            updates,
            state,
            params,
            extra,
            commit=lambda step, params: step,
            held=lambda params: _trees.zeros(structs),
        )

    def fused_step(updates, state, params, **extra):
        return run(
            updates,
            state,
            params,
            extra,
            commit=lambda step, params: optax.apply_updates(params, step),
            held=lambda params: params,
        )

    guarded = GuardedTransformation(init_fn, update_fn)
    guarded.fused_step = fused_step
    return guarded
