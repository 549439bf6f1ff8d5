"""Pieces for a network in which signals and gradients keep their scale.

This module needs no framework. Layers are in `structure.nnx` and `structure.linen`.
"""

from ..clipping._logits import clip_logits as clip_logits
from ._decay import decay_with_schedule as decay_with_schedule
from ._initializers import (
    DeepNorm as DeepNorm,
    activation_init as activation_init,
    deepnorm as deepnorm,
    deepnorm_init as deepnorm_init,
    depth_scaled_init as depth_scaled_init,
    fixup_init as fixup_init,
)
from ._limit_gradient import limit_gradient as limit_gradient
from ._logits import (
    Attended as Attended,
    attend as attend,
    normalize_qk as normalize_qk,
    soft_cap as soft_cap,
    z_loss as z_loss,
)
from ._lsuv import lsuv as lsuv
from ._mean_field import (
    CriticalPoint as CriticalPoint,
    FixedPoint as FixedPoint,
    chi as chi,
    critical_point as critical_point,
    fixed_point as fixed_point,
    gain as gain,
)
