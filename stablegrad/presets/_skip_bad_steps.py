"""Skip outlying steps around an optimizer, by the rules of the large trainers."""

import jax
import optax

from .._checks import require, require_count, require_steps
from .._mapped_axes import AxisName
from ..engine._guard import GuardedTransformation, guard
from ..responses._halt import halt
from ..responses._skip import skip
from ..thresholds._base import optional
from ..thresholds._ema_ratio import ema_ratio
from ..thresholds._limits import nonfinite
from ..thresholds._window_zscore import window_zscore
from ..thresholds._zscore import zscore
from ._published_rules import accepted_mean, window_mean

NEVER = 2**31 - 1
WINDOWS = {
    "olmo": (1, 0.0, True),
    "levanter": (0, 1e-6, False),
    "maxtext": (1, 0.0, True),
}
RULES = (*WINDOWS, "axlearn_mean", "axlearn_deviation")


def skip_bad_steps(
    inner: optax.GradientTransformation,
    rule: str = "olmo",
    *,
    sigma: float | jax.Array = 6.0,
    window: int = 128,
    multiplier: float | jax.Array = 20.0,
    max_consecutive: int | jax.Array = 20,
    halt_after: int | jax.Array = 20,
    published: bool = False,
    axis_name: AxisName = None,
    averaged_gradients: bool = False,
) -> GuardedTransformation:
    """Reject steps whose loss or gradient norm is far above that of the last ones.

        olmo, levanter, maxtext:  x_t > mean + sigma * std of the last `window` steps
        axlearn_mean:             ||g|| >= multiplier * running mean
        axlearn_deviation:        ||g|| >= mean + multiplier * std, from step 500 on

    Published: raw values enter the windows, so one outlier hides those after it and one
    nan loss skips 129 steps; AXLearn's statistics learn from accepted steps only, so a
    lasting shift is rejected for ever. Default: `window_zscore(sigma)` of norm and
    loss, `ema_ratio(multiplier)` or `zscore(multiplier)` of the norm, which do neither;
    and after `max_consecutive` outliers in a row the next is taken.

    Args:
        inner: The optimizer, any optax transformation.
        rule: "olmo", "levanter", "maxtext", "axlearn_mean" or "axlearn_deviation". The
            first three differ only as published: in the deviation's degrees of freedom
            (1, 0, 1), its floor (0, 1e-6, 0), and when half a window is reached.
        sigma: Deviations, for the first three, > 0.
        window: Steps that are remembered, for the first three, >= 4.
        multiplier: Of the running mean, or of the deviation, for the last two, > 1.
        max_consecutive: Finite outliers rejected in a row at most; as published any
            number.
        halt_after: Non-finite steps, with none taken, until `halted` is raised.
        published: Whether the decisions are exactly those of the published rule. What a
            guard promises still holds: a rejected step changes nothing, bit for bit,
            and a nan is never let through, not even before a window is half full.
        axis_name: As for `guard`.
        averaged_gradients: As for `guard`.

    Returns:
        A guarded transformation, for `update` or `stablegrad.apply`. Without `value=`
        the rules for the loss are silent.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.skip_bad_steps(optax.adamw(1e-3), "olmo")

    Reference:
        OLMo et al., 2 OLMo 2 Furious (2024), https://arxiv.org/abs/2501.00656; the
        trainers Levanter, MaxText and AXLearn.
    """
    require("rule", rule, f"one of {RULES}", lambda x: x in RULES)
    require("sigma", sigma, "> 0", lambda x: 0 < x < float("inf"))
    require_count("window", window, 4)
    require_steps("max_consecutive", max_consecutive, least=0)
    require("multiplier", multiplier, "> 1", lambda x: 1 < x < float("inf"))
    if published and rule in WINDOWS:
        ddof, floor, counts = WINDOWS[rule]
        judged = [
            window_mean(of, window, sigma, ddof, floor, counts)
            for of in ("grad_norm", "value")
        ]
        judged[1] = optional(judged[1])
    elif published:
        judged = [accepted_mean(multiplier, rule == "axlearn_deviation")]
    elif rule in WINDOWS:
        judged = [
            window_zscore(sigma, window=window),
            optional(window_zscore(sigma, window=window, of="value")),
        ]
    else:
        of_norm = ema_ratio if rule == "axlearn_mean" else zscore
        judged = [of_norm(multiplier)]
    watched = [] if published else [nonfinite(), optional(nonfinite(of="value"))]
    limit = NEVER if published else max_consecutive
    return guard(
        inner,
        skip(*watched, *judged, max_consecutive=limit),
        halt(after=halt_after),
        axis_name=axis_name,
        averaged_gradients=averaged_gradients,
    )
