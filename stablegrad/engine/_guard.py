"""The guard: how one step runs.

    measure -> decide -> commit -> learn -> record

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
from .._compiled import CompiledUpdate
from .._mapped_axes import AxisName, mapped_axes
from ..granularity._groups import check_sharded
from ..responses._base import Response
from ._step import GuardedStep, GuardState

APPLY = "guard_apply"  # The attribute of a guard's `update` that holds its `apply`.


class GuardedTransformation(optax.GradientTransformationExtraArgs):
    """A guard's `init` and `update`."""


def guard(
    inner: optax.GradientTransformation,
    *responses: Response,
    axis_name: AxisName = None,
    averaged_gradients: bool = False,
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
    axes = mapped_axes(axis_name, averaged_gradients)
    for threshold in (t for r in responses for t in r.thresholds if axis_name):
        check_sharded(threshold.per)
    if exact_updates is not None:
        warnings.warn(
            "`exact_updates` has no effect: norms are always exact. It will be removed "
            "in the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
    step = GuardedStep(inner, responses, axes)
    check = functools.partial(_checks.require_state, "guard", GuardState)
    update = CompiledUpdate(step.update, check)
    setattr(update, APPLY, CompiledUpdate(step.apply, check))
    return GuardedTransformation(step.init, update)
