"""The criteria that decide pass or fail, each on what a run left behind.

`usual` is the median factor that the method puts on healthy steps of the same run: a
method that always shrinks by the same factor only rescales the learning rate.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .faults import HEALTHY, HEAVY_LANES, ONSET, REGULAR_EVERY, STEPS
from .methods import Method
from .problem import LEAVES
from .simulate import Seen


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
    during = slice(ONSET, ONSET + 3)  # Later it may be usual, as a lasting shift is.
    factor = seen.leaf_factor[during][:, others]
    healthy = np.median(seen.leaf_factor[HEALTHY][:, others], axis=0)
    relative = np.min(np.median(factor, axis=0) / np.maximum(healthy, 1e-30))
    grown = np.max(seen.went[during, bad]) / np.max(seen.went[HEALTHY, bad])
    return [
        Check("other leaves: share of steps taken", np.mean(factor > 0), least=0.95),
        Check("other leaves: factor / usual", relative, least=0.9),
        Check("this leaf: largest step / healthy", grown, most=10),
    ]


def wander(r: Results):
    """A spike of 1,000 times the largest norm so far is held."""
    return intact(r.short["wander"])


def fall(r: Results):
    """After a fall by four decades, the old level is a spike."""
    seen, spike = r.short["fall"], ONSET + 150
    grown = seen.size[spike] / np.max(seen.size[spike - 49 : spike])
    return [Check("step of the spike / largest of the 49 before", grown, most=10)]


def rise(r: Results):
    """A slow rise is no fault."""
    return resumes(r.short["rise"], ONSET, STEPS - ONSET)


def loss_rise(r: Results):
    """One lasting rise of the loss lowers the rate a little, and for a while."""
    seen = r.short["loss_rise"]
    relative = seen.factor[ONSET:] / usual(seen)
    # Single steps may be shrunk for their gradient; medians of 9 tell the rate.
    windows = np.lib.stride_tricks.sliding_window_view(relative, 9)
    smooth = np.median(windows, axis=-1)
    return [
        Check("lowest factor / usual", np.min(smooth), least=0.25),
        Check("factor at the end / usual", smooth[-1], least=0.99),
    ]


def regular(r: Results):
    """A kind of step that comes regularly is taken."""
    factor = r.long["regular"].factor / usual(r.long["regular"])
    kind = factor[::REGULAR_EVERY]
    early = -(-1000 // REGULAR_EVERY)  # Steps of the kind among the first 1,000.
    checks = [
        Check("refused", np.sum(kind == 0), most=4),
        Check("shrunk in the first 1,000 steps", np.sum(kind[:early] < 0.999), most=25),
    ]
    if len(kind) > early:
        touched = np.mean(factor[1000:] < 0.999)
        checks += [
            Check("share of all steps shrunk later", touched, most=0.01),
            Check("smallest factor later / usual", np.min(kind[early:]), least=0.5),
        ]
    return checks


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
