"""The rows: each method as a function that puts it around a task's optimizer.

Every peer has the settings of its authors: those of the paper, of the trainer it comes
from, or optax's defaults where optax's function is the authors' own or names no other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from optax import contrib

import stablegrad as sg

from . import replacements
from .running import EXTRAS, Evaluated, as_trained
from .tasks import WARM_UP, Task

WINDOW_OF_PLATEAU = 20  # Steps averaged: an epoch of the digits at batch 64 has 22.
BARE, CLIP = "optimizer alone", "clip_by_global_norm"
KINDS = ("bare", "clip", "guard", "rate", "ours")


class Method(NamedTuple):
    """One row."""

    name: str
    kind: str  # One of KINDS.
    build: Callable[[Task, Any], optax.GradientTransformation]  # task, rate
    settings: str  # As the report states them.
    evaluated: Evaluated = as_trained
    applies: Callable[[Task], bool] = lambda task: True
    extras: tuple[str, ...] = EXTRAS  # What a step is given besides the gradient.

    @property
    def ours(self) -> bool:
        """Whether it is a row that the goals speak of."""
        return self.kind == "ours"


def _before(make: Callable[[Task], optax.GradientTransformation]):
    """A member of a chain, before the optimizer."""
    return lambda task, rate: optax.chain(make(task), task.optimizer(rate))


def _around(wrap: Callable[[optax.GradientTransformation], Any]):
    """A wrapper of the optimizer."""
    return lambda task, rate: wrap(task.optimizer(rate))


def _after(make: Callable[[Task], optax.GradientTransformation]):
    """A member of a chain, after the optimizer."""
    return lambda task, rate: optax.chain(task.optimizer(rate), make(task))


def _peers() -> list[Method]:
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    plateau = contrib.reduce_on_plateau(
        factor=0.5, patience=5, accumulation_size=WINDOW_OF_PLATEAU
    )
    clips = {
        CLIP: (lambda _: optax.clip_by_global_norm(1.0), "norm 1"),
        "adaptive_grad_clip": (lambda _: optax.adaptive_grad_clip(0.01), "0.01"),
        "clip_by_block_rms": (lambda _: optax.clip_by_block_rms(1.0), "rms 1"),
        "AutoClip": (
            lambda task: sg.clip_by_percentile(window=task.steps, published=True),
            "10th percentile of all norms so far",
        ),
        "ZClip": (lambda _: sg.clip_by_zscore(published=True), "z 2.5, decay 0.97"),
        "AdaGC": (lambda _: sg.clip_by_ema(published=True), "as published"),
        "AGC": (
            lambda _: sg.clip_by_param_norm(published=True),
            "as published",
        ),
        "AdaClip": (lambda _: sg.clip_by_max(published=True), "as published"),
    }
    return [
        *(
            Method(name, "clip", _before(make), settings)
            for name, (make, settings) in clips.items()
        ),
        Method(
            "SPAM",
            "clip",
            lambda task, rate: (
                sg.clip_by_second_moment(inner=task.optimizer(rate), published=True)
                if replacements.is_adam(task)
                else _before(lambda _: sg.clip_by_second_moment(published=True))(
                    task, rate
                )
            ),
            "as published, around Adam, with its resets; in the chain for momentum",
        ),
        Method(
            "StableAdamW",
            "clip",
            _around(lambda inner: sg.clip_update_rms(inner=inner, published=True)),
            "as published",
            applies=replacements.is_adam,
        ),
        Method(
            "apply_if_finite",
            "guard",
            _around(lambda inner: optax.apply_if_finite(inner, 5)),
            "5 errors in a row",
        ),
        Method(
            "OLMo skip",
            "guard",
            _around(lambda inner: sg.skip_bad_steps(inner, "olmo", published=True)),
            "6 sigma of the last 128 losses and norms",
        ),
        Method(
            "reduce_on_plateau",
            "rate",
            _after(lambda _: plateau),
            "factor 0.5, patience 5 as in optax's own example; each value the mean "
            f"loss of {WINDOW_OF_PLATEAU} steps",
        ),
        Method(
            "line search",
            "rate",
            _after(lambda _: search),
            "optax's backtracking after the optimizer, which proposes the longest "
            "step; 15 steps back at most; Adam's and momentum's direction need not "
            "descend, which optax's documentation warns of",
        ),
        Method(
            "line search, SGD",
            "rate",
            lambda task, rate: optax.chain(optax.sgd(rate), search),
            "the same after plain SGD, whose direction descends",
        ),
        Method(
            "Polyak step",
            "rate",
            lambda task, rate: optax.polyak_sgd(max_learning_rate=rate),
            "SGD, the rate as longest step, least loss 0",
        ),
        Method(
            "MoMo",
            "rate",
            replacements.momo,
            "`momo_adam`, for momentum `momo`; least loss 0; the rate as upper bound",
        ),
        Method(
            "Prodigy",
            "rate",
            replacements.prodigy,
            "an optimizer of its own with a multiplier in place of a rate, normally 1: "
            "the task's grid is moved so that its geometric middle is 1",
        ),
        Method(
            "DoWG",
            "rate",
            replacements.dowg,
            "SGD; a multiplier on the same moved grid",
        ),
        Method(
            "Mechanic",
            "rate",
            _around(contrib.mechanize),
            "optax's defaults, which are the authors'; it scales the rate",
        ),
        Method(
            "schedule-free",
            "rate",
            replacements.schedule_free,
            f"b1 0.9, warm-up of {WARM_UP} steps everywhere; AdamW, for momentum SGD; "
            "judged at the averaged parameters",
            evaluated=contrib.schedule_free_eval_params,
        ),
    ]


def _ours() -> list[Method]:
    def back_off(inner):
        return sg.guard(inner, sg.back_off(sg.zscore(4.0, of="value")))

    return [
        Method("back_off", "ours", _around(back_off), "z-score 4 of the loss"),
        Method(
            "trust_region",
            "ours",
            _around(lambda inner: sg.guard(inner, sg.trust_region())),
            "one forward pass in four steps",
        ),
        Method(
            "trust_region, hvp",
            "ours",
            _around(lambda inner: sg.guard(inner, sg.trust_region(probe="hvp"))),
            "one `jvp` of a `jvp` in four steps",
        ),
        Method("stabilize", "ours", _around(sg.stabilize), "the preset, all extras"),
        Method(
            "stabilize without value_fn",
            "ours",
            _around(sg.stabilize),
            "the preset, given the loss",
            extras=("value",),
        ),
    ]


def methods() -> list[Method]:
    """All rows, in order."""
    bare = Method(BARE, "bare", _around(lambda inner: inner), "as the task states it")
    return [bare, *_peers(), *_ours()]
