"""The preset: one line that guards an optimizer with sane defaults."""

import jax
import optax

from .._mapped_axes import AxisName
from ..engine._guard import GuardedTransformation, guard
from ..granularity._groups import Granularity
from ..responses._back_off import back_off
from ..responses._clip import clip
from ..responses._halt import halt
from ..responses._skip import skip
from ..responses.trust_region._response import optional_trust_region
from ..thresholds._base import optional
from ..thresholds._limits import nonfinite
from ..thresholds._zscore import zscore


def stabilize(
    inner: optax.GradientTransformation,
    *,
    clip_z: float | jax.Array = 2.5,
    skip_z: float | jax.Array = 6.0,
    back_off_z: float | jax.Array = 4.0,
    factor: float | jax.Array = 0.5,
    regrow_steps: int | jax.Array = 1000,
    min_scale: float | jax.Array = 0.01,
    max_consecutive: int | jax.Array = 20,
    halt_after: int | jax.Array = 20,
    per: Granularity = "global",
    axis_name: AxisName = None,
    averaged_gradients: bool = False,
    exact_updates: bool | None = None,
) -> GuardedTransformation:
    """Guards an optimizer with defaults that healthy training hardly notices.

    It is this guard, no more:

        guard(inner,
              clip(zscore(clip_z, per=per)),
              skip(nonfinite(), nonfinite(of="value"),
                   zscore(skip_z), zscore(skip_z, of="value"),
                   max_consecutive=max_consecutive),
              back_off(zscore(back_off_z, of="value"), factor=factor,
                       confirm_steps=2, regrow_steps=regrow_steps,
                       min_scale=min_scale),
              trust_region(),
              halt(after=halt_after))

    Without `value=` the thresholds on the loss stay silent: outlying and non-finite
    losses are not seen, and the learning rate is never backed off. Pass it if you can.
    Without `value_fn=` (see `trust_region`) the trust region rests. With it, every
    fourth step costs one forward pass more, and a schedule that is too high is held to
    what the loss bears before it does harm, not after.
    With another `per` than "global", outlying gradients are clipped and not rejected:
    zscore(skip_z) is left out, and a leaf that explodes costs the others nothing.

    Args:
        inner: The optimizer, any optax transformation.
        clip_z: Standard deviations of the log-norm above which gradient and update are
            shrunk. 2.5 touches under 1 % of healthy steps, and only their tails. The
            update is clipped too because Adam undoes any clipping of the gradient: a
            learning rate that jumps is then followed by degrees, not at once.
        skip_z: The same, above which a step is rejected, of the gradient's log-norm and
            of the loss. 6.0: practically never by chance, so what is rejected is bad
            data, not a hard batch.
        back_off_z: Standard deviations of the loss above which the learning rate is
            cut, if twice in a row: one bad batch is not the learning rate's fault, and
            two outliers in a row need not be so large.
        factor: One cut of the learning rate, in (0, 1). 0.5 finds the stable rate
            within a factor of two.
        regrow_steps: Calm steps that undo one cut. 1000: slow enough not to explode
            again at once, fast enough to matter within one run.
        min_scale: Smallest factor on the learning rate, in (0, 1]. 0.01: a rate that is
            more than 100 times too high wants mending, not absorbing.
        max_consecutive: Finite outliers rejected in a row at most. 20: longer than a
            bad shard, short enough to lose little where the data has really changed.
        halt_after: Non-finite steps, with none taken, until `halted` is raised. 20: no
            transient lasts as long.
        per: For what gradient and update are clipped, as for `fixed`. "global" keeps
            the gradient's direction.
        axis_name: As for `guard`.
        averaged_gradients: As for `guard`.
        exact_updates: As for `guard`.

    Returns:
        A guarded transformation, for `update` or `stablegrad.apply`.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.stabilize(optax.adamw(optax.cosine_decay_schedule(3e-4, 10_000)))
    """
    return guard(
        inner,
        clip(zscore(clip_z, per=per)),
        skip(
            nonfinite(),
            optional(nonfinite(of="value")),
            *([zscore(skip_z)] if per == "global" else []),
            optional(zscore(skip_z, of="value")),
            max_consecutive=max_consecutive,
        ),
        back_off(
            optional(zscore(back_off_z, of="value")),
            factor=factor,
            confirm_steps=2,
            regrow_steps=regrow_steps,
            min_scale=min_scale,
        ),
        optional_trust_region(),
        halt(after=halt_after),
        axis_name=axis_name,
        averaged_gradients=averaged_gradients,
        exact_updates=exact_updates,
    )
