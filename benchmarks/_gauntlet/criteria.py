"""The criteria that decide pass or fail, each on what a run left behind.

`usual` is the median factor that the method puts on healthy steps of the same run: a
method that always shrinks by the same factor only rescales the learning rate.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .faults import HEALTHY, HEAVY_LANES, ONSET
from .methods import Method
from .problem import LEAVES
from .simulate import Seen
from .special import ACCUMULATED, ADAM_FAULT, BAD_MICRO_BATCH, ZERO_STEPS


@dataclass
class Results:
    """Everything that was seen of one method."""

    method: Method
    short: dict[str, Seen] = field(default_factory=dict)
    long: dict[str, Seen] = field(default_factory=dict)
    special: dict[str, Seen] = field(default_factory=dict)
    flagged: bool = False  # Whether the state has a `halted` flag.
    restored_same: bool | None = None
    structure_changes: str = ""
    errors: dict[str, str] = field(default_factory=dict)  # By program.


class Check(NamedTuple):
    """One measured number and what it must not be below, or above."""

    what: str
    value: float
    least: float = -np.inf
    most: float = np.inf

    @property
    def passed(self) -> bool:
        """False for nan."""
        return bool(self.least <= self.value <= self.most)


def usual(seen: Seen, steps: slice = HEALTHY) -> float:
    """The factor on a healthy step."""
    return max(float(np.median(seen.factor[steps])), 1e-30)


def resumes(seen: Seen, start: int, steps: int = 100, healthy: slice = HEALTHY):
    """Healthy steps are taken, at no less than 0.9 of the usual factor."""
    factor = seen.factor[start : start + steps]
    relative = np.median(factor) / usual(seen, healthy)
    return [
        Check("share of later steps taken", np.mean(factor > 0), least=0.95),
        Check("later factor / usual", relative, least=0.9),
    ]


def intact(seen: Seen, start: int = ONSET, steps: int = 5):
    """Parameters are finite, and no step was out of all proportion."""
    largest = np.max(seen.size[start : start + steps])  # nan if any is.
    largest = largest / np.max(seen.size[HEALTHY])
    finite = np.mean(np.isfinite(seen.far))
    return [
        Check("share of steps with finite parameters", finite, least=1),
        Check("largest step / largest healthy step", largest, most=10),
    ]


def limited(seen: Seen, step: int, to: float, healthy: slice = HEALTHY):
    """An outlier is shrunk to a share of its size, or skipped."""
    relative = seen.factor[step] / usual(seen, healthy)
    return [Check(f"factor on the outlier of step {step} / usual", relative, most=to)]


def survives(lane: str):
    """One bad step: intact, and goes on."""
    return lambda r: intact(r.short[lane]) + resumes(r.short[lane], ONSET + 1)


def nan_loss(r: Results):
    """The step is not taken, the next ones are."""
    seen = r.short["nan_loss"]
    taken = Check("factor on the step itself", seen.factor[ONSET], most=0)
    return [taken, *resumes(seen, ONSET + 1)]


def shift_up(factor: int):
    """The new level is normal within 100 steps."""
    return lambda r: resumes(r.short[f"up_{factor}"], ONSET + 100)


def shift_down(factor: int):
    """So it is, and a spike of 8 times the new level is one again."""

    def check(r: Results):
        seen = r.short[f"down_{factor}"]
        return resumes(seen, ONSET + 100) + limited(seen, ONSET + 150, to=0.5)

    return check


def masking(r: Results):
    """Neither outlier gets through."""
    seen = r.short["masking"]
    return intact(seen) + limited(seen, ONSET + 50, to=0.7)


def constant(r: Results):
    """No false alarm."""
    seen = r.short["constant"]
    low = seen.factor[HEALTHY.start :] < 0.99 * usual(seen)
    return [Check("share of steps skipped or shrunk", np.mean(low), most=0)]


def first(r: Results):
    """What follows is let through, and a spike is still seen."""
    seen, healthy = r.short["first"], slice(300, 600)
    early = resumes(seen, 1, 99, healthy)
    return early + limited(seen, 100, to=0.5, healthy=healthy)


def heavy(r: Results):
    """Training converges all the same."""

    def end(name):
        return np.mean(r.long[name].far[-100:])

    worst = np.max([end(f"heavy_{i}") for i in range(HEAVY_LANES)])
    return [Check("final distance / that without them", worst / end("clean"), most=2)]


def leaf(r: Results):
    """The others go on, this one is held."""
    seen, bad = r.short["leaf"], LEAVES.index("second")
    others = [i for i in range(len(LEAVES)) if i != bad]
    during = slice(ONSET, ONSET + 50)
    factor = seen.leaf_factor[during][:, others]
    healthy = np.median(seen.leaf_factor[HEALTHY][:, others], axis=0)
    relative = np.min(np.median(factor, axis=0) / np.maximum(healthy, 1e-30))
    # Later it may be the new normal, as a lasting shift has to be.
    first = seen.went[ONSET : ONSET + 20, bad]
    grown = np.max(first) / np.max(seen.went[HEALTHY, bad])
    return [
        Check("other leaves: share of steps taken", np.mean(factor > 0), least=0.95),
        Check("other leaves: factor / usual", relative, least=0.9),
        Check("this leaf: largest step / healthy", grown, most=10),
    ]


def zero_leaf(r: Results):
    """It leaves zero."""

    def covered(seen):
        distance = seen.distance[:, LEAVES.index("second")]
        return 1 - distance[-1] / distance[0]

    share = covered(r.short["zero_leaf"]) / covered(r.short["full_leaf"])
    return [Check("way covered / that of the leaf that is not zero", share, least=0.5)]


def stuck(r: Results):
    """Nothing moves meanwhile, a flag is raised, training goes on afterwards."""
    seen, during = r.short["stuck"], slice(ONSET, ONSET + 50)
    unmoved = Check("largest step meanwhile", np.max(seen.size[during]), most=0)
    flag = Check("flag raised", np.max(seen.halted[during]), least=1)
    return [unmoved, *([flag] if r.flagged else []), *resumes(seen, ONSET + 50)]


def structure(r: Results):
    """The state is what `init` made of it."""
    return [Check("changes of the state", len(r.structure_changes), most=0)]


def restored(r: Results):
    """The run goes on as if never stopped."""
    return [Check("same bits", float(bool(r.restored_same)), least=1)]


def half_large(r: Results):
    """The method does what it does in float32."""
    half = r.special["half_large"].factor
    single = r.short["large"].factor[: len(half)]
    with np.errstate(divide="ignore", invalid="ignore"):
        off = np.median(np.abs(np.log(half / single)))
    return [
        Check("share of steps that became zero", np.mean(half == 0), most=0.05),
        Check("|log(factor / that in float32)|", off, most=0.1),
    ]


def half_zero(r: Results):
    """Zeros do no harm, and training goes on."""
    seen = r.special["half_zero"]
    moves = np.mean(seen.size[-ZERO_STEPS:] > 0)
    finite = np.mean(np.isfinite(seen.far))
    return [
        Check("share of steps with finite parameters", finite, least=1),
        Check("share of later steps taken", moves, least=0.95),
    ]


def accumulated(r: Results):
    """The bad micro-batch is the only one lost."""
    size = r.special["accumulated"].size
    early, late = size[:BAD_MICRO_BATCH], size[BAD_MICRO_BATCH + ACCUMULATED :][:100]
    pace = np.mean(late) / np.mean(early)
    finite = np.mean(np.isfinite(r.special["accumulated"].far))
    return [
        Check("share of steps with finite parameters", finite, least=1),
        Check("pace afterwards / before", pace, least=0.5),
    ]


def adam(r: Results):
    """The moments are not frozen."""
    clean, seen = r.special["adam_clean"], r.special["adam_overflow"]
    later = slice(ADAM_FAULT + 50, None)
    pace = np.mean(seen.size[later]) / np.mean(clean.size[later])
    end = seen.far[-1] / clean.far[-1]
    return [
        Check("pace afterwards / without it", pace, least=0.5),
        Check("final distance / without it", end, most=2),
    ]
