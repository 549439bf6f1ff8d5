"""The rows: every failure mode, what passes, and where a row does not apply."""

from collections.abc import Callable
from typing import NamedTuple

from . import criteria, special_criteria
from .criteria import Check, Results
from .faults import SHIFTS
from .methods import Method

GOES_ON = (
    "of the next 100 steps 95 % are taken, at a median factor of 0.9 of the usual one"
)
INTACT = (
    "parameters stay finite, no step is larger than 10 times the largest healthy "
    f"one, and {GOES_ON}"
)


# The keys of rows by the class of failure that they stand for; `shift` is all shifts.
CLASSES = {
    "not finite": "nan_element inf_element nan_loss nan_micro_batch stuck statistics",
    "overflow and float16": "overflow_sgd overflow_adam half_large half_zero muon",
    "outliers": "masking first heavy_tail wander fall sparse",
    "a lasting change": "shift rise loss_rise",
    "what is no fault": "constant regular zero_leaf",
    "one leaf explodes": "one_leaf",
    "a rate that jumps": "rate_jump",
    "state": "scan restore",
}


def class_of(key: str) -> str:
    """Return the class of failure of a row."""
    first = key.split("_")[0] if key.startswith("shift_") else key
    return next(name for name, keys in CLASSES.items() if first in keys.split())


class Row(NamedTuple):
    """One failure mode."""

    key: str
    title: str
    rule: str  # What passes.
    check: Callable[[Results], list[Check]]
    program: str = "short"  # What has to run.
    applies: Callable[[Method], bool] = lambda method: True


def rows() -> list[Row]:
    """All rows, in order."""
    ups = [
        Row(
            f"shift_up_{factor}",
            f"norms x{factor} for good",
            f"after 100 steps, {GOES_ON}",
            criteria.shift_up(factor),
        )
        for factor in SHIFTS
    ]
    downs = [
        Row(
            f"shift_down_{factor}",
            f"norms /{factor} for good",
            "the same, and a spike of 8 times the new level after 150 steps is "
            "shrunk to half of its size at least",
            criteria.shift_down(factor),
        )
        for factor in SHIFTS
    ]
    return [
        Row(
            "nan_element",
            "one nan element",
            INTACT,
            criteria.survives("nan_element"),
        ),
        Row(
            "inf_element",
            "one inf element",
            INTACT,
            criteria.survives("inf_element"),
        ),
        Row(
            "nan_loss",
            "nan loss, finite gradient",
            f"the step is not taken; {GOES_ON}; n.a.: the method never sees the loss",
            criteria.nan_loss,
            applies=lambda method: method.watches_loss,
        ),
        Row(
            "nan_micro_batch",
            "nan micro-batch, MultiSteps",
            "parameters stay finite, and training goes on at half the pace at least; "
            "wrappers go around `optax.MultiSteps(sgd, 4)`, chain members before it: "
            "all see every micro-batch",
            special_criteria.accumulated,
            "accumulated",
        ),
        Row(
            "overflow_sgd",
            "one gradient of 1e20, SGD",
            INTACT,
            criteria.survives("overflow"),
        ),
        Row(
            "overflow_adam",
            "one gradient of 1e20, Adam",
            "50 steps later updates are half as large as without it at least; at the "
            "end, twice as far from the truth at most",
            special_criteria.adam,
            "adam",
        ),
        Row(
            "half_large",
            "float16 elements of 300",
            "as in float32: the factors differ by 10 % at most (median), and 5 % of "
            "the steps at most become zero",
            special_criteria.half_large,
            "half_large",
        ),
        Row(
            "half_zero",
            "float16 Adam, zero gradients",
            "parameters stay finite, and healthy steps that follow are taken",
            special_criteria.half_zero,
            "half_zero",
        ),
        *ups,
        *downs,
        Row(
            "masking",
            "outlier x1000, then x5",
            "no step is larger than 10 times the largest healthy one; the second, 50 "
            "steps later, is shrunk to 0.7 of its size at least",
            criteria.masking,
        ),
        Row(
            "constant",
            "norms constant to 1e-6",
            "no step is skipped or shrunk by more than 1 %",
            criteria.constant,
        ),
        Row(
            "first",
            "first norm x30",
            "steps 1 to 99 are taken, at a median factor of 0.9 of the usual one; a "
            "spike of 8 times the level at step 100 is shrunk to half at least",
            criteria.first,
        ),
        Row(
            "heavy_tail",
            "0.1 % of steps x100 and more",
            "factors of 100 (1 + Pareto(1)); three runs of 2,600 steps end at most "
            "twice as far from the truth as the same method without them",
            criteria.heavy,
            "long",
        ),
        Row(
            "one_leaf",
            "one leaf x1000 for 50 steps",
            "the other leaves' steps are taken, at a median factor of 0.9 of the "
            "usual one, and this leaf's are no larger than 10 times its largest "
            "healthy one, in the first 3 steps, after which it may be usual",
            criteria.leaf,
        ),
        Row(
            "wander",
            "norms over three decades, then x1000",
            "no step is larger than 10 times the largest healthy one",
            criteria.wander,
        ),
        Row(
            "fall",
            "a fall of four decades in 100 steps, then a spike",
            "50 steps after the fall, a step of the old level is no larger than 10 "
            "times the largest of the 49 before it",
            criteria.fall,
        ),
        Row(
            "rise",
            "a slow rise x10 to the end",
            "95 % of these 300 steps are taken, at a median factor of 0.9 of the usual "
            "one",
            criteria.rise,
        ),
        Row(
            "regular",
            "every 16th step x50",
            "of these steps, 4 are refused at most, 25 shrunk among the first 1,000 "
            "steps; later 1 % of all steps are shrunk at most, by half at most",
            criteria.regular,
            "long",
        ),
        Row(
            "loss_rise",
            "a rise of the loss for good",
            "the factor stays above 0.25 of the usual one, and is back within 300 "
            "steps; n.a.: the method never sees the loss",
            criteria.loss_rise,
            applies=lambda method: method.watches_loss,
        ),
        Row(
            "rate_jump",
            "a rate that jumps by x60, SGD",
            "at the end, twice as far from the truth as at the start at most; what "
            "takes `value_fn=` gets it",
            special_criteria.rate_jump,
            "rate_jump",
        ),
        Row(
            "sparse",
            "row-sparse gradients, one x1000",
            "the step is no larger than 10 times the largest healthy one; 95 % of the "
            "later ones are taken, at a median factor of 0.9 of the usual one",
            special_criteria.sparse,
            "sparse",
        ),
        Row(
            "muon",
            "one gradient x5e7, Muon",
            "at the end, twice as far from the truth at most as without it",
            special_criteria.muon,
            "muon",
        ),
        Row(
            "statistics",
            "nan batch under BatchNorm",
            "the running statistics stay finite; what tells that it skipped a step "
            "gives the old ones back",
            special_criteria.statistics,
            "statistics",
        ),
        Row(
            "zero_leaf",
            "one leaf starts at zero",
            "it covers half of the way at least that it covers, with the same method, "
            "from as far on the other side of the truth",
            criteria.zero_leaf,
        ),
        Row(
            "stuck",
            "all nan for 50 steps",
            "nothing moves meanwhile, `halted` is raised where there is such a flag; "
            f"then {GOES_ON}",
            criteria.stuck,
        ),
        Row(
            "scan",
            "runs under `lax.scan`",
            "structure, shapes and dtypes of the state are those of `init`",
            criteria.structure,
        ),
        Row(
            "restore",
            "Orbax restore within a spike",
            "100 steps that follow give the same bits",
            criteria.restored,
        ),
    ]
