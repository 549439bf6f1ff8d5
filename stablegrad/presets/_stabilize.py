"""The preset: one line that guards an optimizer with sane defaults."""

import warnings

import jax
import optax

from .._mapped_axes import AxisName
from ..engine._guard import GuardedTransformation, guard, warn_of_exact_updates
from ..granularity._groups import Granularity
from ..responses._back_off import back_off
from ..responses._base import Response
from ..responses._clip import clip
from ..responses._halt import halt
from ..responses._skip import skip
from ..responses.trust_region._response import optional_trust_region
from ..thresholds._base import optional
from ..thresholds._limits import nonfinite
from ..thresholds._rarity import rarity


def stabilize(
    inner: optax.GradientTransformation,
    *responses: Response,
    share: float | jax.Array = 0.01,
    window: int | jax.Array = 256,
    refuse_factor: float | jax.Array = 32.0,
    loss_margin: float | jax.Array = 2.0,
    factor: float | jax.Array = 0.5,
    regrow_steps: int | jax.Array = 100,
    min_scale: float | jax.Array = 0.01,
    max_consecutive: int | jax.Array = 20,
    halt_after: int | jax.Array = 20,
    per: Granularity = "global",
    axis_name: AxisName = None,
    averaged_gradients: bool = False,
    record_norms: int = 0,
    exact_updates: bool | None = None,
    clip_z: float | None = None,
    skip_z: float | None = None,
    back_off_z: float | None = None,
) -> GuardedTransformation:
    """Guard an optimizer with default responses.

    It builds the guard below. Rules that need `value=` or `value_fn=` are inactive if
    the argument is not passed, and `back_off` if `value_fn=` is.

        guard(inner,
              clip(rarity(share, window=window, per=per)),
              skip(nonfinite(), nonfinite(of="value"),
                   rarity(share, window=window, margin=refuse_factor),
                   max_consecutive=max_consecutive),
              back_off(rarity(share, window=window, margin=loss_margin, of="value"),
                       factor=factor, confirm_steps=3, hold_steps=20,
                       regrow_steps=regrow_steps, min_scale=min_scale),
              trust_region(),
              halt(after=halt_after),
              *responses)

    A gradient whose norm is rare is shrunk to what is usual. A step is refused only if
    gradient or loss is not finite, or if the norm is `refuse_factor` times beyond the
    usual. Whatever comes again and again becomes usual: a batch of another kind, a new
    task, a loss term. If no `value_fn=` is passed, and the loss is far above its usual
    spread and does not fall for three steps in a row, the learning rate is cut once. It
    is fully restored after 20 + `regrow_steps` calm steps. A high finite loss never
    causes a step to be refused.

    Without `value=` non-finite losses are not seen, and the learning rate is never
    backed off; a warning says so once, unless `value=None` is passed. Without
    `value_fn=` (see `trust_region`) no step is probed. With it, steps that are too long
    are shortened before they are taken: every step evaluates the update once more, and
    every fourth step (every eighth while none is shortened) a third time, with a
    forward pass. The learning rate is then never backed off: a rise of the loss alone
    does not tell a high rate from new data. Beside an `inner` with a line search, which
    has checked its step, no step is shortened. With another `per` than "global",
    each group is shrunk to what is usual of its own, and none is refused for its size.

    Args:
        inner: The optimizer, any optax transformation.
        *responses: Further responses, such as `roll_back()`.
        share: Share of steps that count as rare by gradient norm or loss, in (0, 1).
            Rare gradients are shrunk to the norm that the others stay below.
        window: Steps that a norm or a loss is remembered for, >= 2.
        refuse_factor: Multiple of the usual norm from which a step is refused instead
            of shrunk, >= 1. 32: so large a gradient is broken in most cases, and its
            direction is of no use even if it is shrunk.
        loss_margin: Multiple of the usual rise above the loss's level from which the
            learning rate is cut, >= 1.
        factor: One cut of the learning rate, in (0, 1). 0.5 finds the stable rate
            within a factor of two.
        regrow_steps: Calm steps that undo one cut, >= 1.
        min_scale: Smallest factor on the learning rate, in (0, 1]. 0.01: a rate that is
            more than 100 times too high should be fixed, not compensated.
        max_consecutive: Finite outliers rejected in a row at most.
        halt_after: Non-finite steps, with none taken, until `halted` is raised. 20: no
            transient lasts as long.
        per: The granularity of the clip, as for `fixed`. "global" keeps the gradient's
            direction.
        axis_name: As for `guard`.
        averaged_gradients: As for `guard`.
        record_norms: As for `guard`.
        exact_updates: As for `guard`.
        clip_z: Deprecated, without effect, as are `skip_z` and `back_off_z`: limits are
            those of `rarity`.
        skip_z: See `clip_z`.
        back_off_z: See `clip_z`.

    Returns:
        A guarded transformation, for `update` or `stablegrad.apply`.

    Raises:
        TypeError: If one of `responses` is not a response.
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.stabilize(optax.adamw(optax.cosine_decay_schedule(3e-4, 10_000)))
    """
    if not (clip_z is None and skip_z is None and back_off_z is None):
        warnings.warn(
            "`clip_z`, `skip_z` and `back_off_z` have no effect: `stabilize` judges by "
            "`rarity`; see `share`, `refuse_factor` and `loss_margin`. They will be "
            "removed in 0.3.0.",
            DeprecationWarning,
            stacklevel=2,
        )
    warn_of_exact_updates(exact_updates)
    refused = rarity(share, window=window, margin=refuse_factor)
    risen = rarity(share, window=window, margin=loss_margin, of="value")
    return guard(
        inner,
        clip(rarity(share, window=window, per=per)),
        skip(
            nonfinite(),
            optional(nonfinite(of="value")),
            *([refused] if per == "global" else []),
            max_consecutive=max_consecutive,
        ),
        back_off(
            optional(risen, unless="value_fn"),
            factor=factor,
            confirm_steps=3,
            hold_steps=20,
            regrow_steps=regrow_steps,
            min_scale=min_scale,
        ),
        optional_trust_region(),
        halt(after=halt_after),
        *responses,
        axis_name=axis_name,
        averaged_gradients=averaged_gradients,
        record_norms=record_norms,
    )
