"""The guard: how one step runs.

    measure -> decide -> look ahead -> commit -> learn -> roll back -> record

    measure   one sum of squares a leaf                                  (`_norms`)
    decide    signals against limits, judgements to one verdict        (`_decide`)
    commit    the inner optimizer, once; what is finite is written     (`_commit`)
    learn     statistics turn the step into the limits of the next   (`_families`)
    record    what `metrics` and `events` read                         (`_record`)

Every known method is a threshold and a response. ZClip is `clip(zscore(2.5))`: its
threshold keeps the mean and the deviation of the log-norm, and its response turns a
norm above the limit into a factor on the gradient. OLMo's skip is
`skip(window_zscore(6.0), window_zscore(6.0, of="value"))`: the same kind of limit, but
its response turns an outlier into a reason to reject the step. Adaptive gradient
clipping is `clip(param_ratio(0.01, per="unit"))`: its limit comes from the parameters,
one for each output neuron, and `group_scales` spreads its factors over the leaves.

Responses see judgements, never gradients, so methods combine freely and a step is
multiplied once and selected once. A threshold on `update_norm`, and a response that
probes the loss along the step, cost one more evaluation of the update.
"""

import functools
import warnings

import optax

from .. import _checks
from .._compiled import compiled
from .._mapped_axes import AxisName, mapped_axes
from ..granularity._groups import check_sharded
from ..responses._base import Response
from ._event_log import check_batch
from ._step import GuardedStep, GuardState

APPLY = "guard_apply"  # The attribute of a guard's `update` that holds its `apply`.


class GuardedTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that guards its inner optimizer; `guard` makes it."""


def guard(
    inner: optax.GradientTransformation,
    *responses: Response,
    axis_name: AxisName = None,
    averaged_gradients: bool = False,
    record_norms: int = 0,
    exact_updates: bool | None = None,
) -> GuardedTransformation:
    """Guard an optimizer with responses, and record what they did.

    With g the gradient, S the inner state, and s, s', k the factors that `clip` (of the
    gradient, of the update) and `back_off` ask for:

        u_t, S_t = inner(s_t g_t, S_{t-1});    step_t = k_t s'_t u_t
        if any response rejects the step:      step_t = 0, S_t = S_{t-1}

    Whatever the responses, a step is rejected if its gradient is not finite, or if the
    norm of it is 1e18 or more. An element of the update, of the parameters or of the
    inner state that the optimizer makes non-finite is kept as it was, and counted in
    `metrics`; the other elements are updated. On a CPU, trees of more than 65,536
    float32 elements have their inner state checked in the first 8 steps, in every
    256th, where a leaf norm exceeds 1e12, and after a step that kept something out; a
    step that would break the state is then rejected.

    An integer passed as `batch_id=`, in [0, 2**31) and the same on all devices, is kept
    with the event if the guard intervenes: see `batches_to_leave_out`.

    Thresholds judge by past steps alone. They see the raw signals, and learn from every
    finite one, also in rejected steps; a norm of exactly zero teaches nothing.

    Args:
        inner: The optimizer, any optax transformation; extra arguments reach it.
        *responses: What to do about which steps: `clip`, `skip`, `back_off`,
            `trust_region`, `roll_back`, `halt`, `layer_health`.
        axis_name: The mapped axis, or a tuple of axes, of `shard_map` or `pmap` over
            which gradients and parameters are sharded. Norms are those of all shards,
            losses are averaged, and every device decides alike. A leaf that does not
            vary over the axis counts once, where `shard_map` tracks that (`check_vma`);
            otherwise every leaf counts as a shard. None: arrays are whole.
        averaged_gradients: Whether gradients are already averaged over `axis_name`, so
            that every device holds the whole of them. Then only the loss is averaged.
        record_norms: Last steps, >= 0, of which the guard keeps the gradient norm of
            each leaf, the loss and the limits for `history`: 4 bytes a leaf and step.
        exact_updates: Deprecated, without effect: norms are always exact.

    Returns:
        A transformation for `update`, or for `stablegrad.apply`. It keeps structure,
        shapes and dtypes, and leaves out leaves that are not floating point. Its own
        numbers are one float32 and one int32 vector, placed where the parameters are. A
        rejected step's updates are zeros. A threshold on "update_norm" costs one more
        evaluation of the update.

    Raises:
        TypeError: If `inner` is not an optax transformation, or a later argument is not
            a response.
        ValueError: If a threshold judges units and there is an `axis_name`, if there
            are two `roll_back` or `layer_health`, if `averaged_gradients` comes without
            an `axis_name`, or if `record_norms` is negative.
            When a step is traced, if `value=` or `params` is needed and missing, if
            `batch_id=` is not one integer in range, if the state is not the guard's, if
            a gradient has another shape than its parameter, or if the pytree has other
            leaves than the one given to `init`.

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
                f"by one; got {_checks.short_repr(response)}."
            )
    axes = mapped_axes(axis_name, averaged_gradients)
    for threshold in (t for r in responses for t in r.thresholds if axis_name):
        check_sharded(threshold.per)
    warn_of_exact_updates(exact_updates)
    _checks.require_count("record_norms", record_norms, least=0)
    step = GuardedStep(inner, responses, axes, record_norms)
    is_own = functools.partial(_checks.require_state, "guard", GuardState)
    checks = (is_own, step.check_leaves, check_batch)
    update = compiled(step.update, *checks)
    setattr(update, APPLY, compiled(step.apply, *checks))
    return GuardedTransformation(step.init, update)


def warn_of_exact_updates(exact_updates: bool | None) -> None:
    """Warn the caller of a function that takes `exact_updates`, if it is given."""
    if exact_updates is not None:
        warnings.warn(
            "`exact_updates` has no effect: norms are always exact. It will be removed "
            "in 0.3.0.",
            DeprecationWarning,
            stacklevel=3,
        )
