"""The result of `critical_learning_rate`."""

import dataclasses
import math

import jax
import numpy as np

from ._estimates import Estimates

_NOISE = 2.0  # A larger ratio of same-batch to cross-batch rate is due to noise.

EXPLAINED = {
    "no descent": "The update does not lower the loss at any rate: check its sign, and "
    "that `tx` was built for these parameters.",
    "no gradient": "The gradient is zero here: nothing limits the rate, and nothing "
    "will be learned either.",
    "negative curvature": "The loss curves downwards along the update, so the "
    "directional estimate gives no limit.",
    "no curvature": "The loss is straight along the update: its curvature is 0, which "
    "limits no rate.",
    "no rise": "The loss did not rise at any rate that was tried: it saturates, or "
    "decreases without bound, and no limit was found.",
    "rises everywhere": "The loss rose at every rate that was tried: is `loss_fn` the "
    "same function at every call? Freeze its random keys.",
    "noise": "On another batch the limit is less than half as high: the gradient noise "
    "is too large. Use a larger batch, or start lower.",
}


@dataclasses.dataclass(frozen=True)
class CriticalLearningRate:
    """Learning rates at which training spikes; `str()` gives advice.

    Rates are in [0, inf], or nan where they were not measured.
    """

    critical: float  # `probe`; without it the smaller of `directional` and `forward`.
    safe_start: float  # Half of the smallest of the three limits.
    directional: float
    forward: float
    probe: float  # nan without probe steps.
    cross_batch: float  # nan unless more batches were given.
    polyak: float  # A guide, not a limit.
    parameter: float  # A guide, not a limit.
    loss: float  # On the batch, or the mean over several.
    slope: float  # g.u: first derivative of the loss in the learning rate.
    curvature: float  # u.Hu: second derivative of the loss in the learning rate.
    method: str  # How the curvature was computed.
    flags: tuple[str, ...]  # Warnings, in a word or two.

    def margin(self, rate: float) -> float:
        """Return the rate divided by the critical one; training spikes above 1."""
        return rate / self.critical if self.critical else math.inf

    def __str__(self) -> str:
        limits = {
            "probe": self.probe,
            "forward": self.forward,
            "directional": self.directional,
            "other batch": self.cross_batch,
        }
        known = [f"{k} {x:.3g}" for k, x in limits.items() if not math.isnan(x)]
        found = f"({', '.join(known)})"
        if not {"no gradient", "no descent", "rises everywhere"}.isdisjoint(self.flags):
            first = f"No learning rate can be recommended {found}."
        elif math.isinf(self.critical):
            first = f"No critical learning rate was found {found}."
            if math.isfinite(self.safe_start):
                first += f" Start at {self.safe_start:.2g} or below."
        else:
            first = (
                f"Training spikes at a learning rate of about {self.critical:.3g} "
                f"{found}: start at {self.safe_start:.2g} or below."
            )
        guides = {
            "Polyak's step": self.polyak,
            "a step of a thousandth of the parameters": self.parameter,
        }
        known = [f"{k} is {x:.2g}" for k, x in guides.items() if math.isfinite(x)]
        second = [f"For comparison: {', and '.join(known)}."] if known else []
        return " ".join([first, *second, *(EXPLAINED[flag] for flag in self.flags)])


def report(
    estimates: list[Estimates], cross_lengths, best_loss: float, method: str
) -> CriticalLearningRate:
    """Combine the batches: geometric means of the rates, and means of the rest."""
    # One number a batch, in float64 on the host, where no product overflows.
    each = jax.tree.map(
        lambda *numbers: np.array(numbers, np.float64),
        *[one._replace(direction=None) for one in estimates],
    )
    size = each.update_norm
    slope = float(np.mean(each.slope * size))
    curvature = float(np.mean(each.curvature * size**2))
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = lambda length: _geometric_mean(np.where(size > 0, length / size, np.inf))
        directional, forward = rate(each.directional), rate(each.forward)
        cross_batch = rate(np.array(cross_lengths)) if cross_lengths else math.nan
        probe = _geometric_mean(each.probe)
        # A loss below `best_loss` shows that this is not the best one.
        gap = np.where(each.loss >= best_loss, each.loss - best_loss, np.nan)
        polyak = _geometric_mean(gap / (-each.slope * size))
    no_gradient, descends = not each.gradient_norm.any(), slope < 0
    checks = {
        "no gradient": no_gradient,
        "no descent": not no_gradient and not descends,
        "negative curvature": descends and curvature < 0,
        "no curvature": descends and curvature == 0,
        "no rise": descends and math.inf in (forward, probe),
        "rises everywhere": descends and 0 in (forward, probe),
        "noise": descends and forward > _NOISE * cross_batch,
    }
    if no_gradient or not descends:
        directional = forward = math.inf if no_gradient else 0.0
        probe = math.nan if math.isnan(probe) else forward
    one_step = min(directional, forward)
    critical = one_step if math.isnan(probe) else probe
    return CriticalLearningRate(
        critical=critical,
        safe_start=0.5 * min(one_step, critical),
        directional=directional,
        forward=forward,
        probe=probe,
        cross_batch=cross_batch,
        polyak=polyak,
        parameter=_geometric_mean(each.parameter),
        loss=float(np.mean(each.loss)),
        slope=slope,
        curvature=curvature,
        method=method,
        flags=tuple(flag for flag, holds in checks.items() if holds),
    )


def _geometric_mean(rates: np.ndarray) -> float:
    """Return the geometric mean; 0 if any rate is <= 0, also beside an infinite one."""
    if rates.min() <= 0:
        return 0.0
    return math.exp(np.mean(np.log(rates)))
