"""Guards for training that blows up: bounded, loud and explained."""

from importlib.metadata import version as _version

from ._apply import apply as apply
from ._guard import GuardedTransformation as GuardedTransformation, guard as guard
from ._observe import (
    TrainingHalted as TrainingHalted,
    events as events,
    is_healthy as is_healthy,
    metrics as metrics,
    raise_if_halted as raise_if_halted,
)
from ._reasons import Reason as Reason
from ._stabilize import stabilize as stabilize
from .responses._back_off import back_off as back_off
from .responses._clip import clip as clip
from .responses._halt import halt as halt
from .responses._skip import skip as skip
from .thresholds._ema_ratio import ema_ratio as ema_ratio
from .thresholds._limits import fixed as fixed, nonfinite as nonfinite
from .thresholds._window_zscore import window_zscore as window_zscore
from .thresholds._zscore import zscore as zscore

__version__ = _version("stablegrad")
