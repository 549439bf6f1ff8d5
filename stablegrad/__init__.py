"""Guards that keep JAX training runs alive, built on Optax."""

from importlib.metadata import (
    PackageNotFoundError as _PackageNotFoundError,
    version as _version,
)

from . import structure as structure, sweep as sweep
from ._events import events as events
from ._observe import (
    TrainingHalted as TrainingHalted,
    is_healthy as is_healthy,
    keep_if_skipped as keep_if_skipped,
    metrics as metrics,
    raise_if_halted as raise_if_halted,
)
from ._scalars import scalars as scalars
from .clipping._direction import limit_direction as limit_direction
from .clipping._ema import clip_by_ema as clip_by_ema
from .clipping._max import clip_by_max as clip_by_max
from .clipping._norm import clip_by_norm as clip_by_norm
from .clipping._param_norm import clip_by_param_norm as clip_by_param_norm
from .clipping._percentile import clip_by_percentile as clip_by_percentile
from .clipping._second_moment import clip_by_second_moment as clip_by_second_moment
from .clipping._update_rms import clip_update_rms as clip_update_rms
from .clipping._zscore import clip_by_zscore as clip_by_zscore
from .curvature._critical import critical_learning_rate as critical_learning_rate
from .curvature._range_test import learning_rate_range_test as learning_rate_range_test
from .curvature._sharpness import sharpness as sharpness
from .diagnose._diagnose import diagnose as diagnose
from .engine._apply import apply as apply
from .engine._guard import (
    GuardedTransformation as GuardedTransformation,
    guard as guard,
)
from .engine._unwrap import unwrap as unwrap
from .flight_recorder._event_files import (
    batches_to_leave_out as batches_to_leave_out,
    load_events as load_events,
    save_events as save_events,
)
from .flight_recorder._history import history as history
from .granularity._groups import units as units
from .learning_rate._observe_metric import observe_metric as observe_metric
from .learning_rate._plateau import reduce_on_plateau as reduce_on_plateau
from .learning_rate._scale_by_schedule import (
    scale_by_explosion_aware_schedule as scale_by_explosion_aware_schedule,
)
from .learning_rate._stateful_schedule import (
    explosion_aware_schedule as explosion_aware_schedule,
)
from .presets._skip_bad_steps import skip_bad_steps as skip_bad_steps
from .presets._stabilize import stabilize as stabilize
from .recovery._adopt import adopt as adopt
from .recovery._migrate import migrate as migrate
from .recovery._replay import replay as replay
from .responses._back_off import back_off as back_off
from .responses._clip import clip as clip
from .responses._halt import halt as halt
from .responses._layer_health import layer_health as layer_health
from .responses._reasons import Reason as Reason
from .responses._skip import skip as skip
from .responses.roll_back._response import roll_back as roll_back
from .responses.trust_region._response import trust_region as trust_region
from .structure._limit_gradient import limit_gradient as limit_gradient
from .thresholds._ema_ratio import ema_ratio as ema_ratio
from .thresholds._limits import fixed as fixed, nonfinite as nonfinite
from .thresholds._param_ratio import param_ratio as param_ratio
from .thresholds._percentile import percentile as percentile
from .thresholds._rarity import rarity as rarity
from .thresholds._window_zscore import window_zscore as window_zscore
from .thresholds._zscore import zscore as zscore

try:
    __version__ = _version("stablegrad")
except _PackageNotFoundError:  # A source tree that was never installed.
    __version__ = "0+unknown"
