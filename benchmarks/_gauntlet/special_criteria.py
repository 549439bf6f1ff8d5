"""The criteria for what the special programs left behind."""

import numpy as np

from .criteria import Check, Results
from .problem import START
from .special import (
    ACCUMULATED,
    ADAM_FAULT,
    BAD_MICRO_BATCH,
    SPARSE_FAULT,
    ZERO_STEPS,
)


def sparse(r: Results):
    """A spike of a gradient with few rows is held."""
    seen, healthy = r.special["sparse"], slice(50, SPARSE_FAULT)
    grown = seen.size[SPARSE_FAULT] / np.max(seen.size[healthy])
    later = seen.factor[SPARSE_FAULT + 1 :]
    relative = np.median(later) / np.median(seen.factor[healthy])
    return [
        Check("largest step / largest healthy step", grown, most=10),
        Check("share of later steps taken", np.mean(later > 0), least=0.95),
        Check("later factor / usual", relative, least=0.9),
    ]


def muon(r: Results):
    """The momentum of Muon does not keep a spike."""
    clean, seen = r.special["muon_clean"], r.special["muon_spike"]
    return [Check("final distance / without it", seen.far[-1] / clean.far[-1], most=2)]


def statistics(r: Results):
    """Batch statistics outlive a nan batch."""
    finite = np.mean(np.isfinite(r.special["statistics"].distance))
    return [Check("share of steps with finite statistics", finite, least=1)]


def rate_jump(r: Results):
    """A rate far beyond the stable one does not undo what was learned."""
    far = r.special["rate_jump"].far[-20:]
    return [Check("final distance / that at the start", np.max(far) / START, most=2)]


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
