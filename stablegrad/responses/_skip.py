"""Skip: reject a step, and leave parameters and optimizer state as they were."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import require_steps
from ..thresholds import _limits
from ..thresholds._base import Threshold
from ._base import Response, any_true, check_thresholds, proceed
from ._reasons import first_reason, is_nonfinite, reason_code


class SkipState(NamedTuple):
    outlier_run: jax.Array  # int32, in [0, max_consecutive]: finite outliers in a row.


def skip(*thresholds: Threshold, max_consecutive: int | jax.Array = 20) -> Response:
    """Reject a step if any of its signals is above its threshold.

        reject_t = nonfinite_t or (exceeded_t and c_{t-1} < max_consecutive)
        c_t = min(c_{t-1} + 1, max_consecutive) if exceeded_t, 0 at a normal step taken

    A rejected step leaves the parameters and the inner optimizer's state bit for bit as
    they were. A gradient, or a signal of `thresholds`, that is nan or inf is
    always rejected; a loss only if one of them watches it, as `nonfinite(of="value")`
    does. Finite outliers are taken after
    `max_consecutive` in a row, so that no threshold can stop a run for ever.

    Args:
        *thresholds: The thresholds. None given means `nonfinite()`.
        max_consecutive: Finite outliers rejected in a row at most, >= 0 steps.

    Returns:
        A response for `guard`.

    Raises:
        TypeError: If an argument is not a threshold.
        ValueError: If a concrete `max_consecutive` is negative.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.skip(sg.nonfinite(), sg.zscore(6.0)))

    Reference:
        The skip-step of OLMo et al. (2024), https://arxiv.org/abs/2501.00656; unlike
        `optax.apply_if_finite`, which applies a nan after a while.
    """
    check_thresholds("skip", thresholds)
    thresholds = thresholds or (_limits.nonfinite(),)
    require_steps("max_consecutive", max_consecutive, least=0)

    def init() -> SkipState:
        return SkipState(outlier_run=jnp.zeros((), jnp.int32))

    def propose(state: SkipState, judgements):
        patient = state.outlier_run < max_consecutive
        codes = [
            reason_code(
                threshold.of,
                jnp.any(judgement.nonfinite),
                jnp.any(judgement.exceeded) & patient,
            )
            for threshold, judgement in zip(thresholds, judgements, strict=True)
        ]
        return proceed(reason=first_reason(codes))

    def settle(state: SkipState, judgements, reason) -> SkipState:
        outlier = any_true(judgements, "exceeded") & ~is_nonfinite(reason)
        longer = jnp.minimum(state.outlier_run + 1, max_consecutive).astype(jnp.int32)
        # A step rejected for another reason neither ends nor lengthens a run.
        ended = jnp.where(reason == 0, 0, state.outlier_run)
        return SkipState(outlier_run=jnp.where(outlier, longer, ended))

    return Response("skip", thresholds, init, propose, settle)
