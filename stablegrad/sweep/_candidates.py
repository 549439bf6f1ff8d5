"""Candidates: an optimizer with a learning-rate policy, clips and a guard.

A name joins words by "+". The first is the optimizer. Any clips, at most one policy and
at most one guard follow in any order. Clips transform the gradient before the optimizer
and the guard wraps the whole chain.

    "adamw"    "momentum + stairs_down"    "adam + clip_by_zscore + cosine + stabilize"
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optax

from .. import _checks
from ..clipping._ema import clip_by_ema
from ..clipping._max import clip_by_max
from ..clipping._norm import clip_by_norm
from ..clipping._param_norm import clip_by_param_norm
from ..clipping._percentile import clip_by_percentile
from ..clipping._second_moment import clip_by_second_moment
from ..clipping._zscore import clip_by_zscore
from ..engine._guard import guard
from ..learning_rate._plateau import reduce_on_plateau
from ..learning_rate._stateful_schedule import explosion_aware_schedule
from ..presets._skip_bad_steps import skip_bad_steps
from ..presets._stabilize import stabilize
from ..responses.trust_region._response import trust_region
from ..thresholds._zscore import zscore
from ._lookahead import lookahead
from ._policies import POLICIES

Transformation = optax.GradientTransformation

OPTIMIZERS: dict[str, Callable[[Any], Transformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adagrad": optax.adagrad,
    "adadelta": optax.adadelta,
    "rmsprop": optax.rmsprop,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadam": optax.nadam,
    "amsgrad": optax.amsgrad,
    "lion": optax.lion,
    "lamb": optax.lamb,
    "lookahead": lambda rate: lookahead(optax.adam(rate), 5, 0.5),
    "muon": optax.contrib.muon,
    "prodigy": optax.contrib.prodigy,
    "schedule_free": lambda rate: optax.contrib.schedule_free_adamw(rate),
}

CLIPS: dict[str, Callable[[], Transformation]] = {
    "clip_by_norm": lambda: clip_by_norm(1.0),
    "clip_by_zscore": clip_by_zscore,
    "clip_by_percentile": clip_by_percentile,
    "clip_by_ema": clip_by_ema,
    "clip_by_param_norm": clip_by_param_norm,
    "clip_by_second_moment": clip_by_second_moment,
    "clip_by_max": clip_by_max,
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
}

GUARDS: dict[str, Callable[[Transformation], Transformation]] = {
    "stabilize": stabilize,
    "skip_bad_steps": skip_bad_steps,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "trust_region": lambda tx: guard(tx, trust_region()),
    # `stabilize` uses a trust region if `update` gets `value_fn=`.
    "stabilize_trust_region": stabilize,
}
EXTRA = ("value", "grad", "value_fn")
PROBING = ("trust_region", "stabilize_trust_region")
WORDS = {
    "optimizer": tuple(OPTIMIZERS),
    "policy": (*POLICIES, "plateau", "explosion_aware"),
    "clip": tuple(CLIPS),
    "guard": tuple(GUARDS),
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An optimizer to compare; build one if its `update` needs more than `value=`.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> build = lambda rate, steps: sg.guard(optax.sgd(rate), sg.trust_region())
        >>> extra = ("value", "value_fn")
        >>> probing = sg.sweep.Candidate("probing", build, extra=extra)
    """

    name: str
    build: Callable[[Any, int], Transformation]  # rate, which may be traced; steps
    own_rate: bool = False  # Whether `build` ignores the rate: it runs at one only.
    extra: tuple[str, ...] = ("value",)  # For `update`, some of EXTRA.
    observes: bool = False  # Whether evaluated losses are passed to `observe_metric`.

    def __post_init__(self):
        known = lambda names: not isinstance(names, str) and set(names) <= set(EXTRA)
        _checks.require("extra", self.extra, f"a tuple of some of {EXTRA}", known)


def candidate(given: Any, name: str | None = None) -> Candidate:
    """Make a candidate from a name, a transformation or a function of the rate."""
    if isinstance(given, str):
        found = _parse(given)
    elif isinstance(given, Candidate):
        found = given
    elif _is_transformation(given):
        found = Candidate("given", lambda rate, steps: given, own_rate=True)
    elif callable(given):
        make: Callable[[Any], Any] = given
        called = getattr(make, "__name__", "given").replace("<lambda>", "given")
        found = Candidate(called, lambda rate, steps: make(rate))
    else:
        raise TypeError(
            "a candidate must be a name such as 'adamw + cosine', a transformation, or "
            f"a function of the learning rate, got {_checks.short_repr(given)}."
        )
    return found if name is None else dataclasses.replace(found, name=name)


def candidates(given: Any) -> list[Candidate]:
    """Make candidates from one entry, from a list, or from a dict by name."""
    single = isinstance(given, str | Candidate) or _is_transformation(given)
    if single or not isinstance(given, Iterable):
        given = [given]
    if isinstance(given, Mapping):
        found = [candidate(entry, str(name)) for name, entry in given.items()]
    else:
        found = [candidate(entry) for entry in given]
    names = [one.name for one in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"`candidates` must have different names, got {', '.join(repeated)} twice. "
            "Pass a dict to name them."
        )
    if not found:
        raise ValueError("`candidates` must hold at least one candidate, got none.")
    return found


def _is_transformation(given) -> bool:
    return callable(getattr(given, "init", None)) and hasattr(given, "update")


def _parse(text: str) -> Candidate:
    chosen: dict[str, list[str]] = {kind: [] for kind in WORDS}
    for word in map(str.strip, text.split("+")):
        allowed = list(WORDS)[1:] if chosen["optimizer"] else ["optimizer"]
        kind = next((kind for kind in allowed if word in WORDS[kind]), None)
        if kind is None:
            known = "; ".join(f"{kind}: {', '.join(WORDS[kind])}" for kind in allowed)
            raise ValueError(
                f"{text!r} has the unknown word {word!r}. Known words are {known}."
            )
        chosen[kind].append(word)
    for kind in ("policy", "guard"):
        if len(chosen[kind]) > 1:
            raise ValueError(
                f"{text!r} must name at most one {kind}, got {', '.join(chosen[kind])}."
            )
    (optimizer,), clips = chosen["optimizer"], chosen["clip"]
    (policy,) = chosen["policy"] or ["static"]
    (guarded,) = chosen["guard"] or [None]

    def build(rate, steps: int) -> Transformation:
        tx = _with_policy(OPTIMIZERS[optimizer], policy, rate, steps)
        if clips:
            tx = optax.chain(*(CLIPS[word]() for word in clips), tx)
        return GUARDS[guarded](tx) if guarded else tx

    extra = ("value", "value_fn") if guarded in PROBING else ("value",)
    return Candidate(text, build, extra=extra, observes=policy == "plateau")


def _with_policy(make, policy: str, rate, steps: int) -> Transformation:
    if policy == "plateau":
        return optax.chain(make(rate), reduce_on_plateau(0.5, patience=3, metric=None))
    if policy == "explosion_aware":
        aware = explosion_aware_schedule(rate, zscore(4.0, of="value"), confirm_steps=2)
        injected = optax.inject_hyperparams(lambda learning_rate: make(learning_rate))
        return injected(learning_rate=aware)
    return make(POLICIES[policy](rate, steps))
