"""The guard: measures a step once, asks every response, multiplies and selects once.

    gradient -> measure -> judge -> propose -> [inner optimizer -> measure -> judge
             -> propose -> hold or commit] -> learn -> settle -> record

What is in brackets is a way of stepping (`stepping`). A step that is rejected for its
gradient or loss never reaches the inner optimizer.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _trees
from .._mapped_axes import AxisName, across
from .._norms import measure, scaled_norm
from ..bounds._ranges import Ranges
from ..granularity._groups import check_sharded, group
from ..responses._base import Response
from ..stepping._core import Situation
from ..stepping._ways import init_ranges, take_step
from . import _decide as _judging, _record
from ._families import batches_of, init_batches, learned, with_limits

FUSED = "fused_step"  # Where a guard's `update` keeps it.


class GuardState(NamedTuple):
    """State of `guard`."""

    guarded_inner: Any  # State of the inner transformation.
    threshold_states: tuple  # One state for all thresholds of a family.
    response_states: tuple  # For each response, its own state.
    record: _record.Record  # What `metrics` and `events` read.
    ranges: Ranges  # Of inner state and parameters.
    layout: dict[str, None]  # Names of the leaves given to `init`; no arrays.


class GuardedTransformation(optax.GradientTransformationExtraArgs):
    """A guard's `init` and `update`, and the fused step that `apply` takes."""

    @property
    def fused_step(self) -> Callable[..., tuple[Any, GuardState]]:
        """Kept with `update`, so that a copy of the guard, as a pytree, has it too."""
        return getattr(self.update, FUSED)


def guard(
    inner: optax.GradientTransformation,
    *responses: Response,
    axis_name: AxisName = None,
    exact_updates: bool | None = None,
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
        axis_name: The mapped axis, or a tuple of axes, of `shard_map` or `pmap` over
            which gradients and parameters are sharded: norms are those of all shards,
            losses are averaged, and every device decides alike. A leaf that does not
            vary over the axis counts once, where `shard_map` tells (`check_vma`);
            otherwise every leaf counts as a shard. None: what a device sees is all.
        exact_updates: Whether every update is computed, measured and checked in each
            element before it is kept, which takes memory for another copy of parameters
            and state. If not, its norm is that of a sample of its rows, within a few
            percent, and it is written in place once the ranges of what enters it show
            that nothing can overflow; where they do not, it is inspected first. None:
            exact up to 65,536 elements.

    Returns:
        A transformation for `update`, or for `stablegrad.apply`. It keeps structure,
        shapes and dtypes, passes over leaves that are not floating point, and holds its
        own numbers in float32 and int32. A rejected step's updates are zeros.

    Raises:
        TypeError: If `inner` is not an optax transformation, or a later argument is not
            a response.
        ValueError: If a threshold judges units and there is an `axis_name`. When a step
            is traced, if `value=` or `params` is needed and
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
    known = _known_arguments(transformation.update)
    limit_names = _judging.limit_names(responses)
    over = across(axis_name)
    batches = batches_of(responses)
    for threshold in (t for r in responses for t in r.thresholds if axis_name):
        check_sharded(threshold.per)

    def init_fn(params) -> Any:
        names = _trees.leaf_names(params)
        watched = init_batches(batches, lambda t: group(t.per, params).count)
        answers = tuple(response.init() for response in responses)
        record = _record.init_record(limit_names)
        # Some optimizers start with one buffer in two places, which cannot be donated.
        inner_state = _trees.distinct(
            _trees.strongly_typed(transformation.init(params))
        )
        ranges = init_ranges(inner_state, params, exact_updates, over)
        return GuardState(
            inner_state,
            *_trees.distinct((watched, answers, record, ranges)),
            layout=params if _trees.is_stand_in(params) else _trees.layout(names),
        )

    def run(updates, state: GuardState, params, extra, commit, held) -> Any:
        """One step: `commit(update, params)` if taken, `held(params)` if not."""
        _checks.same_leaves(_trees.names_in(state.layout), _trees.leaf_names(updates))
        gradient = measure(updates, over=over)
        scopes = _judging.scopes_of(responses, updates, params, over)
        limited = with_limits(batches, state.threshold_states, responses, scopes)
        incoming = _judging.judge_incoming(
            limited, scopes, gradient, updates, params, extra, over
        )

        def step_inner(updates, inner_state, params):
            update, new = transformation.update(
                updates, inner_state, params, **known(extra)
            )
            _checks.same_state(inner_state, new)
            return update, new

        now = Situation(
            responses=limited,
            response_states=state.response_states,
            scopes=scopes,
            gradient=gradient,
            words=incoming,
            verdict=_judging.verdict_on(responses, state.response_states, incoming),
            extra=extra,
            over=over,
            inner=step_inner,
            commit=commit,
            held=held,
        )
        taken = take_step(now, updates, state.guarded_inner, params, state.ranges)
        reason = taken.verdict.reason
        settled = tuple(
            response.settle(response_state, own, reason)
            for response, response_state, own in zip(
                responses, taken.ahead.state, taken.words, strict=True
            )
        )
        halted = [r.halts(s) for r, s in zip(responses, settled, strict=True)]
        limits = (judgement.limit for own in taken.words for judgement in own)
        record = _record.update_record(
            state.record,
            gradient,
            taken.update,
            taken.verdict,
            clipped_norm=scaled_norm(gradient, taken.verdict.gradient_scale, updates),
            applied_norm=taken.applied_norm,
            limits=dict(zip(limit_names, limits, strict=True)),
            loss=_judging.loss_of(extra, over),
            ahead=taken.ahead,
            halted=jnp.any(jnp.stack(halted)) if halted else jnp.zeros((), bool),
        )
        return taken.result, GuardState(
            taken.inner_state,
            learned(batches, state.threshold_states, taken.words),
            settled,
            record,
            taken.ranges,
            state.layout,
        )

    def update_fn(updates, state, params=None, **extra):
        try:
            structs, _ = jax.eval_shape(
                lambda *args: transformation.update(*args, **known(extra)),
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

    setattr(update_fn, FUSED, fused_step)
    return GuardedTransformation(init_fn, update_fn)


def _known_arguments(update) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Leaves out what an inner `update` without `**extra_args` would not take.

    A guard itself takes `value=`, which its user must be free to pass.
    """
    parameters = inspect.signature(update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return lambda extra: extra
    return lambda extra: {k: v for k, v in extra.items() if k in parameters}
