"""What `critical_learning_rate` found, in numbers and in sentences."""

import dataclasses
import math

_NOISE = 2.0  # Same-batch over cross-batch rate: above it, noise decides.

EXPLAINED = {
    "no descent": "The update does not lower the loss at any rate: check its sign, and "
    "that `tx` was built for these parameters.",
    "no gradient": "The gradient is zero here: nothing limits the rate, and nothing "
    "will be learned either.",
    "negative curvature": "The loss curves downwards along the update, so the "
    "directional estimate says nothing.",
    "no curvature": "The loss is straight along the update: its curvature is 0, which "
    "limits no rate.",
    "no rise": "The loss did not rise at any rate that was tried: it saturates, or "
    "falls for ever, and no limit was found.",
    "rises everywhere": "The loss rose at every rate that was tried: is `loss_fn` the "
    "same function at every call? Freeze its random keys.",
    "noise": "On another batch the limit is less than half as high: noise decides. Use "
    "a larger batch, or start lower.",
}


@dataclasses.dataclass(frozen=True)
class CriticalLearningRate:
    """Rates at which training spikes; `str()` says what to do.

    Rates are in [0, inf], nan where they were not measured.
    """

    critical: float  # The probe; without it the smaller of the two below.
    safe_start: float  # Half of the smallest of the three limits.
    directional: float
    forward: float
    probe: float  # nan without probe steps.
    cross_batch: float  # nan unless more batches were given.
    polyak: float  # A guide, not a limit.
    parameter: float  # A guide, not a limit.
    loss: float  # On the batch, or the mean over several.
    slope: float  # g.u: what the first step gains, per unit of learning rate.
    curvature: float  # u.Hu.
    method: str  # Where the curvature came from.
    flags: tuple[str, ...]  # What to be wary of, in a word or two.

    def margin(self, rate: float) -> float:
        """A rate as a fraction of the critical one; above 1 it spikes."""
        return rate / self.critical if self.critical else math.inf

    def __str__(self) -> str:
        """The limit, where to start, and what to be wary of."""
        limits = [
            f"{name} {value:.3g}"
            for name, value in (
                ("probe", self.probe),
                ("forward", self.forward),
                ("directional", self.directional),
                ("other batch", self.cross_batch),
            )
            if not math.isnan(value)
        ]
        told = f"({', '.join(limits)})"
        if not {"no gradient", "no descent", "rises everywhere"}.isdisjoint(self.flags):
            first = f"No learning rate can be recommended {told}."
        elif math.isinf(self.critical):
            first = f"No critical learning rate was found {told}."
            if math.isfinite(self.safe_start):
                first += f" Start at {self.safe_start:.2g} or below."
        else:
            first = (
                f"Training spikes at a learning rate of about {self.critical:.3g} "
                f"{told}: start at {self.safe_start:.2g} or below."
            )
        guides = [
            f"{guide} is {value:.2g}"
            for guide, value in (
                ("Polyak's step", self.polyak),
                ("a step of a thousandth of the parameters", self.parameter),
            )
            if math.isfinite(value)
        ]
        second = [f"For comparison: {', and '.join(guides)}."] if guides else []
        return " ".join([first, *second, *(EXPLAINED[flag] for flag in self.flags)])


def report(
    *,
    directional: float,
    forward: float,
    probe: float,
    cross_batch: float,
    slope: float,
    curvature: float,
    gradient_norm: float,
    **others,
) -> CriticalLearningRate:
    """Combines the limits, and flags what to be wary of."""
    checks = {
        "no gradient": gradient_norm == 0,
        "no descent": gradient_norm > 0 and not slope < 0,
        "negative curvature": slope < 0 and curvature < 0,
        "no curvature": slope < 0 and curvature == 0,
        "no rise": slope < 0 and math.inf in (forward, probe),
        "rises everywhere": slope < 0 and 0 in (forward, probe),
        "noise": slope < 0 and forward > _NOISE * cross_batch,
    }
    if gradient_norm == 0 or not slope < 0:
        nothing = math.inf if gradient_norm == 0 else 0.0
        directional = forward = nothing
        probe = math.nan if math.isnan(probe) else nothing
    measured = [x for x in (directional, forward, probe) if not math.isnan(x)]
    return CriticalLearningRate(
        critical=min(directional, forward) if math.isnan(probe) else probe,
        safe_start=0.5 * min(measured),
        directional=directional,
        forward=forward,
        probe=probe,
        cross_batch=cross_batch,
        slope=slope,
        curvature=curvature,
        flags=tuple(flag for flag, holds in checks.items() if holds),
        **others,
    )
